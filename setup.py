"""Which packages the distribution holds; everything else is declared in pyproject.toml.

`mllm_fast/kernels` is a symbolic link to `kernels/`, which has no `__init__.py` itself (a regular package named
`kernels` in the working directory would stand in for the project of that name that transformers and bitsandbytes look
for). Searching for namespace packages finds it through the link, so it is packed as `mllm_fast.kernels`.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=find_namespace_packages(include=["mllm_fast*"], exclude=["*__pycache__*"]),
    package_data={"mllm_fast": ["py.typed"], "mllm_fast.kernels.attention": ["measured.json"]},
)
