# lte-lightning in an image, for CPU and CUDA. No image was built: there was no Docker daemon. The commands below ran in a
# Debian 12 root made by debootstrap (amd64, Debian's Python 3.11.2 in a virtual environment in place of the image's Python,
# PyTorch's CPU wheel as TORCH), and there `lightning fit --config lte:quickstart --trainer.fast_dev_run true` ended well.
# The CUDA build was not tried.
#
#   docker build -t lte .                                              # PyTorch's CUDA build, which runs on CPUs, too
#   docker build -t lte --build-arg TORCH=ADDRESS-OF-A-CPU-WHEEL .      # a tenth of the size
#   docker run --rm -v "$PWD:/work" lte fit --config lte:quickstart
#   docker run --rm --gpus all -v "$PWD:/work" lte fit --config lte:own-classifier --data.source reviews.csv
FROM python:3.11-slim-bookworm

# On Linux the package index serves the CUDA build by this name.
ARG TORCH=torch==2.13.0

# The compiler builds the CPU kernels, once, below.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/lte-lightning
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY conf conf
COPY sweeps sweeps
COPY lte_lightning lte_lightning
RUN pip install --no-cache-dir "$TORCH" && pip install --no-cache-dir -c constraints.txt ".[quickstart,export]"
RUN lte build-kernels --out /opt/lte-kernels
ENV LTE_KERNELS=/opt/lte-kernels
# The image has no git, and MLflow remarks on that at length.
ENV GIT_PYTHON_REFRESH=quiet
WORKDIR /work
ENTRYPOINT ["lightning"]
