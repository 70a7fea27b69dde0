"""The C extension; everything else is in pyproject.toml: only a script can ask numpy where its headers are."""

import numpy
from setuptools import Extension, setup

KERNELS = ["g711", "g722", "l16", "resample"]

setup(
    ext_modules=[
        Extension(
            "streamsink._codecs",
            sources=["codecs/module.c", *(f"codecs/{kernel}.c" for kernel in KERNELS)],
            depends=["codecs/lanes.h", "codecs/prototype.h", *(f"codecs/{kernel}.h" for kernel in KERNELS)],
            include_dirs=[numpy.get_include()],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno"],
            py_limited_api=True,
        )
    ]
)
