# One image for all three services; compose.yaml says which one a container runs.
FROM python:3.11-slim-bookworm

# The default index carries torch with CUDA. For a smaller image give the index of the CPU builds:
#   docker compose build --build-arg TORCH_INDEX_URL=...
ARG TORCH_INDEX_URL=
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /app
COPY constraints.txt ./
RUN pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch==$(sed -n 's/^torch==//p' constraints.txt)"

COPY . .
RUN pip install . -c constraints.txt \
    && groupadd --gid 10001 cachedattention \
    && useradd --uid 10001 --gid 10001 --create-home cachedattention \
    && install --directory --mode=0700 --owner=cachedattention --group=cachedattention /data /run/cachedattention

USER cachedattention
ENV CACHEDATTENTION_DATA_DIR=/data \
    CACHEDATTENTION_RUN_DIR=/run/cachedattention \
    CACHEDATTENTION_HOST=0.0.0.0 \
    CACHEDATTENTION_METRICS_HOST=0.0.0.0 \
    HF_HOME=/data/models/hub
EXPOSE 8000 9101 9102
ENTRYPOINT ["cachedattention"]
CMD ["up"]
