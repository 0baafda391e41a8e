# glalm on PyTorch's CUDA image. Triton compiles with the image's gcc.
#
#   docker build -t glalm .
#   docker run --gpus all --ipc host -v $PWD/data:/work/data -v $PWD/runs:/work/runs glalm \
#       torchrun --standalone --nproc-per-node=8 -m glalm train experiment=gla_340m
#
# --ipc host: NCCL and the data loader need more shared memory than a container has by default.
ARG IMAGE=pytorch/pytorch:2.11.0-cuda12.8-cudnn9-devel
FROM ${IMAGE}
WORKDIR /opt/glalm
COPY . .
# The image has its own torch, so the constraint on it does not apply.
RUN grep -v '^torch==' constraints.txt > image-constraints.txt
RUN pip install --no-cache-dir -c image-constraints.txt '.[eval,trackers]'
RUN glalm train experiment=gla_340m train.dry_run=true train.assumed_gpu=H200 train.assumed_gpus=8
WORKDIR /work
CMD ["glalm", "--help"]
