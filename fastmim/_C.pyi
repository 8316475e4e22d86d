torch_version: str
compiler: str

def isa() -> str: ...
