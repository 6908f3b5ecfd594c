"""Peak memory of a rank: the moments of a training step, each the sum of what is alive then. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_scale.model.log_probs import CHUNK_ELEMENTS, PLAIN_CHUNK, chunk_tokens
from dpo_scale.operations.zero_memory import (
    Parameter,
    Unit,
    ZeroSettings,
    gathered,
    gradient_bytes,
    optimizer_step_bytes,
    parameters_of,
    states,
)


@dataclass(frozen=True, slots=True)
class UnitMemory:
    """Bytes of a unit's activations above what was there when its forward began."""

    saved: int
    """Kept for the backward pass."""
    forward: int
    """Most while its forward runs."""
    backward: int
    """Most while its backward runs, what it saved included."""


@dataclass(frozen=True, slots=True)
class Activations:
    """A micro-batch's activations, unit by unit, the head left out."""

    tokens: int
    units: tuple[UnitMemory, ...]
    """The embedding, every decoder layer, the final norm."""

    def of(self, tokens: int) -> Activations:
        """The same for another number of tokens: they are proportional."""
        share = tokens / self.tokens
        scaled = (UnitMemory(int(u.saved * share), int(u.forward * share), int(u.backward * share)) for u in self.units)
        return Activations(tokens, tuple(scaled))

    def __sub__(self, smaller: Activations) -> Activations:
        """What the tokens cost that another micro-batch has less: without what does not depend on their number."""
        pairs = zip(self.units, smaller.units, strict=True)
        units = (UnitMemory(a.saved - b.saved, a.forward - b.forward, a.backward - b.backward) for a, b in pairs)
        return Activations(self.tokens - smaller.tokens, tuple(units))


@dataclass(frozen=True, slots=True)
class Head:
    """The language model head on the completion tokens of a micro-batch."""

    completion_tokens: int
    hidden: int
    vocabulary: int
    soft_capped: bool = False
    """Whether logits pass through a tanh, whose gradient needs them beside itself."""


@dataclass(frozen=True, slots=True)
class Device:
    """How a kind of device differs in what it needs beside the tensors themselves."""

    name: str
    chunk_elements: int
    """Logits that exist at once, see `model.log_probs.CHUNK_ELEMENTS`."""

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


GPU = Device("gpu", chunk_elements=CHUNK_ELEMENTS["cuda"])
CPU = Device("cpu", chunk_elements=CHUNK_ELEMENTS["cpu"])


@dataclass(frozen=True, slots=True)
class Moment:
    """One moment of a step, in bytes of the device."""

    name: str
    states: int
    gathered: int = 0
    activations: int = 0
    head: int = 0
    gradients: int = 0
    update: int = 0

    @property
    def total(self) -> int:
        return self.states + self.gathered + self.activations + self.head + self.gradients + self.update


def head_memory(head: Head, dtype_bytes: int, device: Device) -> UnitMemory:
    """Follows `model.log_probs.ChunkedLogProbs`.

    A GPU multiplies in the model's dtype; a CPU works on an fp32 copy of the weight, in fp32 the weight itself.
    """
    rows, weight = head.completion_tokens, head.vocabulary * head.hidden
    in_a_chunk = chunk_tokens(rows, head.vocabulary, device.chunk_elements)
    chunk = in_a_chunk * head.vocabulary
    kept = 0 if head.soft_capped or not rows else 4 * (chunk + in_a_chunk)  # with its highest logits
    native = not device.is_cpu and dtype_bytes < 4
    converted = 4 * weight if dtype_bytes < 4 and not native else 0
    saved = rows * (head.hidden * dtype_bytes + 4 + 4 + 8 + 8)  # log-prob, log-sum-exp, target, predictor
    forward = saved + converted + max(4 * chunk, kept)
    held = saved + converted + rows * head.hidden * dtype_bytes + 4 * weight
    # The gradient takes the place of the logits, or of what was kept of them.
    beside = 4 * chunk if head.soft_capped else dtype_bytes * chunk if native else 0
    backward = held + max(4 * chunk, kept) + beside
    rounded = held - converted + dtype_bytes * weight * (dtype_bytes < 4)  # the gradient as the weight's dtype has it
    return UnitMemory(saved + kept, forward, max(backward, rounded))


def layout_check_bytes(completion_tokens: int, vocabulary: int, dtype_bytes: int) -> int:
    """Logits of the start-up check: one sequence after the other goes through the model's plain forward.

    Follows `CompletionLogProbs`, without gradients.

    Args:
        completion_tokens: of the longest completion in the checked pairs.
    """
    as_fp32 = min(completion_tokens, PLAIN_CHUNK) * vocabulary * 4 * (2 if dtype_bytes < 4 else 1)
    return completion_tokens * vocabulary * dtype_bytes + as_fp32


@dataclass(frozen=True, slots=True)
class MicroBatchShape:
    """What the memory of a micro-batch depends on."""

    activations: Activations
    head: Head
    checked_tokens: int
    """Of the start-up check, see `layout_check_bytes`."""


def training_moments(
    units: Sequence[Unit],
    shape: MicroBatchShape,
    zero: ZeroSettings,
    *,
    ranks: int,
    dtype_bytes: int,
    checkpointing: bool,
    device: Device = GPU,
) -> list[Moment]:
    """Every moment of a training step that may be the peak of a rank, in order."""
    parameters: list[Parameter] = parameters_of(units)
    resting = sum(states(parameters, zero, ranks, dtype_bytes, cpu=device.is_cpu).device.values())
    whole = gathered(units, zero, recompute=checkpointing)
    element_bytes = _gathered_element_bytes(zero, ranks, dtype_bytes)
    gradients = gradient_bytes(units, zero, ranks, dtype_bytes)
    head = head_memory(shape.head, dtype_bytes, device)
    check = layout_check_bytes(shape.checked_tokens, shape.head.vocabulary, dtype_bytes)
    last = len(units) - 1
    moments = [Moment("layout check", resting, element_bytes * whole.forward[last], head=check)]
    kept = 0
    backwards = []
    for number, (unit, memory) in enumerate(zip(units, shape.activations.units, strict=True)):
        forward, backward = element_bytes * whole.forward[number], element_bytes * whole.backward[number]
        moments.append(Moment(f"forward of {unit.name}", resting, forward, kept + memory.forward))
        backwards.append(
            Moment(f"backward of {unit.name}", resting, backward, kept + memory.backward, gradients=gradients[number])
        )
        kept += memory.saved
    moments += [
        Moment("forward of the head", resting, element_bytes * whole.forward[last], kept, head.forward),
        Moment("backward of the head", resting, element_bytes * whole.backward[last], kept, head.backward),
        *reversed(backwards),
    ]
    update = optimizer_step_bytes(parameters, zero, ranks)
    moments.append(Moment("optimizer step", resting, update=update))
    return moments


def scoring_moments(
    units: Sequence[Unit],
    shape: MicroBatchShape,
    zero: ZeroSettings,
    *,
    ranks: int,
    dtype_bytes: int,
    device: Device = GPU,
) -> list[Moment]:
    """The same for the reference pass: weights only, nothing kept between layers."""
    parameters = parameters_of(units)
    held = states(parameters, zero, ranks, dtype_bytes, cpu=device.is_cpu).device
    resting = sum(held.get(name, 0) for name in ("weights", "small weights, kept whole", "cuBLAS workspaces"))
    whole = gathered(units, zero, recompute=False)
    head = head_memory(shape.head, dtype_bytes, device)
    check = layout_check_bytes(shape.checked_tokens, shape.head.vocabulary, dtype_bytes)
    element_bytes = _gathered_element_bytes(zero, ranks, dtype_bytes)
    last = element_bytes * whole.forward[len(units) - 1]
    return [
        Moment("layout check", resting, last, head=check),
        *(
            Moment(f"forward of {unit.name}", resting, element_bytes * whole.forward[number], memory.forward)
            for number, (unit, memory) in enumerate(zip(units, shape.activations.units, strict=True))
        ),
        Moment("forward of the head", resting, last, shape.activations.units[-1].saved, head.forward),
    ]


def _gathered_element_bytes(zero: ZeroSettings, ranks: int, dtype_bytes: int) -> int:
    """A rank that holds all weights on its device uses them where they lie: nothing is gathered beside them."""
    return 0 if ranks == 1 and zero.offload_param == "none" else dtype_bytes


def peak(moments: Sequence[Moment]) -> Moment:
    """The moment that needs most."""
    return max(moments, key=lambda moment: moment.total)
