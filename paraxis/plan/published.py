"""Step times by equations that others have published: what the planner's simulation is held against.

They know a pipeline of equal stages by the seconds of one micro-batch, messages between stages by their bytes, and the summing of
gradients at the end of a step, which they do not overlap with anything. AMP: Li et al. 2022, "AMP: Automatically Finding Model Parallel
Strategies with Heterogeneity Awareness" (arXiv:2210.07297), section 4.2. Pipette: Yim et al. 2024, "Pipette: Automatic Fine-grained
Large Language Model Training Configurator for Real-World Clusters" (DATE), with the term that its released planner has for what
memory-efficient schedules pay for messages again and again.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GPTStep:
    """A step of a GPT in half precision as the equations see it.

    `forward_s` and `backward_s` are those of one micro-batch on the slowest stage, tensor-parallel exchanges and recomputation
    included; bandwidths in bytes/s are those that one device has between stages, and between replicas.
    """

    width: int
    layers: int
    vocab_size: int
    seq_len: int
    micro_batch: int
    micro_batches: int
    tensor: int
    stages: int
    replicas: int
    forward_s: float
    backward_s: float
    stages_bytes_per_s: float
    replicas_bytes_per_s: float

    @property
    def micro_batch_s(self) -> float:
        return self.forward_s + self.backward_s

    @property
    def message_s(self) -> float:
        """Activations from one stage to the next: every tensor-parallel rank sends all of them."""
        return 2 * self.micro_batch * self.seq_len * self.width / self.stages_bytes_per_s

    def gradients_s(self, entries_of_block: int) -> float:
        """A ring that sums the gradients of one rank's parameters over the replicas; `entries_of_block` in units of width squared."""
        entries = self.vocab_size * self.width + entries_of_block * self.width**2 * self.layers / self.stages
        return 2 * (self.replicas - 1) / self.replicas * 2 * entries / self.tensor / self.replicas_bytes_per_s


def amp_s(step: GPTStep) -> float:
    """AMP: the slowest stage for every micro-batch but the first, all stages for that one, messages once."""
    pipeline = (step.micro_batches - 1 + step.stages) * step.micro_batch_s
    return pipeline + 2 * (step.stages - 1) * step.message_s + step.gradients_s(12)


def pipette_s(step: GPTStep) -> float:
    """Pipette: one forward and one backward in turn make messages part of every round of as many micro-batches as there are stages.

    A last round that is not full is left out, as in the released planner, which is AMP's where there is no full one. Gradients are
    counted there as 16 width^2 a block.
    """
    if step.micro_batches < step.stages:
        return amp_s(step)
    path = 2 * (step.stages - 1) * step.message_s
    rounds = step.micro_batches // step.stages * (step.stages * step.micro_batch_s + path)
    return (step.stages - 1) * step.micro_batch_s + rounds + step.gradients_s(16)
