from torch import Tensor

torch_version: str

class Request:
    """A layout of an op's arguments whose plan is wanted."""

    def keep(
        self,
        results: list[Tensor],
        scratch: list[int],
        launches: list[tuple[int, tuple[int, int, int], int, int, list[tuple[int, int, int]]]],
    ) -> None: ...
    def refuse(self) -> None: ...

def take_request() -> Request | None: ...
def serve(op: str, recorded: str, device: str) -> None: ...
