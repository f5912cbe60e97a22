# The environment of the full recipe on GPUs: the versions of requirements/cpu.txt, with CUDA 13 where a package has it.
#
#   docker build -t vlm .                                  or, for `--sdm apptainer`:
#   docker save vlm -o vlm.tar && apptainer build vlm.sif docker-archive://vlm.tar
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

# Python 3.12 is Ubuntu's; git names the commit in reports; the compiler and Python's headers are for Triton's launchers.
# Ubuntu keeps one version of a package, so that a pinned one would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential git python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/vlm
ENV PATH=/opt/vlm/bin:$PATH PIP_NO_CACHE_DIR=1

COPY requirements/cpu.txt /src/requirements/
# PyTorch and Triton come as their pair for CUDA 13, everything else as it is locked.
RUN grep -v -i -E '^(torch|triton)==' /src/requirements/cpu.txt > /tmp/locked.txt \
    && pip install "torch==$(sed -n 's/^torch==//p' /src/requirements/cpu.txt)" \
        --index-url https://download.pytorch.org/whl/cu130 \
    && pip install --requirement /tmp/locked.txt \
    && pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]>=2.9'

COPY . /src
RUN pip install --no-deps --no-build-isolation --editable /src && vlm --help > /dev/null
