"""In which order messages start, work is done, and messages are waited for."""

from typing import ClassVar

from torch.utils._python_dispatch import TorchDispatchMode


class Order(TorchDispatchMode):
    """Notes what runs while it is entered: "send", "wait", "product" and "attention"."""

    NAMES: ClassVar = {
        "all_to_all_single": "send",
        "wait_tensor": "wait",
        "mm": "product",
        "bmm": "product",
        "_scaled_dot_product_flash_attention_for_cpu": "attention",
        "_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
    }

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if name := self.NAMES.get(func._schema.name.split("::")[1]):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))
