"""
polyce's compiled kernels: arrays in, losses and gradients out. An array must be what the call was described with; all else is checked by polyce.call.problem.
"""

from collections.abc import Sequence


class Call:
    """What calls of one shape, one set of dtypes and options share."""

    def __init__(self, shape: Sequence[int], axis: int, logits_dtype: str, target_dtype: str, kind: str, entries: int, teacher_scale: float, wide: bool, result_dtype: str, reduction: str, ignored: int | None, check_labels: bool, smoothing: float, z_loss: float, scale: float, cap: float, normalized: bool, all_classes: int | None = None) -> None: ...

    def run(self, logits: object, target: object, target_probability: object | None, weight: object | None, sample_weight: object | None, normalizer: object, losses: object | None, stats: object | None, saved: object | None, cotangent: object, by_row: bool, grad_lse: object | None, grad_entropy: object | None, grad: object | None, fresh: bool, backward: bool) -> int | None:
        """
        Compute, and write what has a place; arrays have the buffer protocol, or are torch tensors on a CPU. Gives the place of the first bad label, where labels are checked; then nothing was written. A gradient is `fresh` where its memory is dense and has never been written.
        """

    def run_part(self, logits: object, target: object, target_probability: object | None, weight: object | None, sample_weight: object | None, start: int, teacher: object | None, rows: object, entropy: bool, first: bool, squares: bool, cotangent: object, by_row: bool, grad_lse: object | None, grad_entropy: object | None, grad: object | None) -> None:
        """
        Read some of `all_classes` classes, from `start` on, into `rows`: of each number that a row's parts are joined by those of all rows. With a gradient, `rows` are of the whole, and it is written. A teacher's logits are read for its rows, and whole ones are taken as `teacher`.
        """

    def log_softmax(self, logits: object, out: object) -> None:
        """Write log(softmax(logits)) into out."""

    @property
    def saves_rows(self) -> bool:
        """Whether a backward pass is spared a reading of the logits by `saved`."""

def get_num_threads() -> int:
    """Give the number of threads of a large call."""

def set_num_threads(count: int) -> None:
    """Set it."""

def isa() -> str:
    """Name the instruction set in use."""

def isas() -> tuple[str, ...]:
    """Name the instruction sets that are here, best first."""

def use_isa(name: str) -> bool:
    """Use this instruction set from now on; False if it is not here."""

class Kept:
    """What is known of calls like one that was kept."""

def answer_cross_entropy(given: tuple[object, ...]) -> object:
    """
    Answer a call of cross_entropy if one like it was kept, else return None.
    """

def answer_cross_entropy_with_grad(given: tuple[object, ...]) -> object:
    """
    Answer a call of cross_entropy_with_grad if one like it was kept, else return None.
    """

def answer_cross_entropy_in_place(given: tuple[object, ...]) -> object:
    """
    Answer a call of polyce.torch's with inplace_backward, else return None.
    """

def answer_backward(kept: Kept, saved: tuple[object, ...], normalizer: object | None, cotangent: object | None, address: int | None) -> object:
    """
    Compute the gradient of a loss on torch's graph, or return None if that needs the whole way. With an address it goes over the logits, if these still lie there.
    """

def fill_node(node: object, logits: object, target: object, weight: object | None, made: tuple[object, ...]) -> object:
    """
    Give a node of torch's graph what its backward pass needs, and return the loss.
    """

def keep(function: str, given: tuple[object, ...], **more: object) -> None:
    """
    Keep how a call was computed, so that calls like it can be answered. `call` is what was prepared for it; `like_loss`, `like_grad` and `like_saved` say how arrays are made; of torch's, `apply` puts a loss on the graph, where a node keeps `rule`.
    """

def forget() -> None:
    """Forget all calls that were kept."""

def expect(of_torch: bool, mapping: dict[object, object], name: object, value: object | None) -> None:
    """
    Answer, or answer on tensors, only while a mapping has this very value; an Ellipsis stands for none.
    """

def expect_answer(of_torch: bool, function: object, value: object | None) -> None:
    """The same of a function without arguments, and what it returns."""

def open_numpy(c_api: object) -> bool:
    """Answer calls on NumPy's arrays, if they are laid out as is known."""

def open_torch(tensor: object, functions: object) -> bool:
    """
    Answer calls on torch's tensors, if their type has DLPack's C exchange interface.
    """
