"""The three ways a call can fail. Only the ComfyUI adapter turns them into a fallback."""


class Unsupported(ValueError):
    """A call that a variant (or every variant) cannot do.

    A caller may fall back to another attention: nothing has run and nothing was written.

    Attributes:
        parameter: the argument that is at fault, by its name in the public signature.
        reason: what was given and what is accepted.
    """

    def __init__(self, parameter: str, reason: str):
        super().__init__(f"{parameter}: {reason}")
        self.parameter = parameter
        self.reason = reason


class TorchOnly(Unsupported):
    """Tensors that no variant reads and torch's own attention may: of another rank, nested, of a subclass, strided along head_dim, of
    several batches or numbers of heads that broadcast, or, under torch.autocast, of several dtypes."""


class KernelMissing(RuntimeError):
    """A variant that exists, but whose kernel is not in this installation or can't be loaded on this machine.

    Attributes:
        variant: the variant's name.
        reason: which kernel, where it was looked for, and the remedy.
    """

    def __init__(self, variant: str, reason: str):
        super().__init__(f"{variant}: {reason}")
        self.variant = variant
        self.reason = reason


class CudaError(RuntimeError):
    """A CUDA driver call that failed: symbol, code and launch are in the message. Never swallowed."""
