# One image for all three services; compose.yaml says which one a container runs.
FROM python:3.11-slim-bookworm AS build

# The default index carries torch with CUDA. For a much smaller image give the index of the CPU builds:
#   docker compose build --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
# Without network: collect the packages in wheelhouse/ (as tests/compose/run does) and give PIP_NO_INDEX=1.
ARG TORCH_INDEX_URL=
ARG PIP_NO_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_FIND_LINKS=/build/wheelhouse

WORKDIR /build
RUN python -m venv /opt/cachedattention
ENV PATH=/opt/cachedattention/bin:$PATH

# torch first and alone: it is most of the download, and a change of our own code leaves it as it is.
# (The pattern lets a context without wheelhouse/ pass.)
COPY constraints.txt wheelhouse* wheelhouse/
RUN pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep '^torch==' wheelhouse/constraints.txt)"

COPY . .
RUN pip install . -c constraints.txt


FROM python:3.11-slim-bookworm

# A named volume takes its first owner and mode from the directory it is mounted on.
RUN groupadd --gid 10001 cachedattention \
    && useradd --uid 10001 --gid 10001 --create-home cachedattention \
    && install --directory --mode=0700 --owner=cachedattention --group=cachedattention \
        /data /data/models /run/cachedattention

COPY --from=build /opt/cachedattention /opt/cachedattention

USER cachedattention
ENV PATH=/opt/cachedattention/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    CACHEDATTENTION_DATA_DIR=/data \
    CACHEDATTENTION_RUN_DIR=/run/cachedattention \
    CACHEDATTENTION_HOST=0.0.0.0 \
    CACHEDATTENTION_METRICS_HOST=0.0.0.0 \
    HF_HOME=/data/models/hub \
    NUMBA_CACHE_DIR=/data/models/kernels
EXPOSE 8000 9101 9102
ENTRYPOINT ["cachedattention"]
CMD ["up"]
