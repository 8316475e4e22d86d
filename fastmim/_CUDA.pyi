torch_version: str
cuda_version: int
architectures: str
