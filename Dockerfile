# The server as an image: non-root, no compiler, ready for a read-only root file system.
#
#   docker build -t gla-server:cpu .
#   docker build -t gla-server:cuda --build-arg BACKEND=cuda \
#     --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 \
#     --build-arg RUNTIME_BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 .
#   docker run --rm --read-only -p 8001:8001 -p 127.0.0.1:8002:8002 gla-server:cpu
#
# Serves the bundled model; an own checkpoint: -v /path/to/checkpoint:/models/own:ro
# -e GLA_MODEL=/models/own. Every flag of the server has such an environment twin.
ARG BASE=debian:bookworm-slim
# The same distribution as BASE, without compilers.
ARG RUNTIME_BASE=${BASE}

# ---- build: the compiler stays here
FROM ${BASE} AS build
ARG BACKEND=cpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src
COPY deploy/lib.sh deploy/
RUN source deploy/lib.sh && install_packages "${BUILD_PACKAGES[@]}"
COPY . .
RUN source deploy/lib.sh \
 && { [[ $BACKEND != cuda ]] || find_nvcc || die "BACKEND=cuda: expected nvcc in BASE, found none"; } \
 && build release "gla-server-${BACKEND}" gla \
 && mkdir -p /out/bin && cd build/release/bin \
 && cp "gla-server-${BACKEND}" gla libgla_sentencepiece.so /out/bin/ \
 && strip /out/bin/* \
 && runtime_packages /out/bin/* > /out/packages \
 && ln -s "gla-server-${BACKEND}" /out/bin/gla-server

# ---- runtime: the server, its client, the shared libraries they name, the bundled model
FROM ${RUNTIME_BASE}
ARG BACKEND=cpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="gla-server" \
      org.opencontainers.image.description="gRPC serving of Gated Linear Attention models (${BACKEND})" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /out/packages /opt/gla-server/packages
RUN apt-get -q update \
 && DEBIAN_FRONTEND=noninteractive xargs -a /opt/gla-server/packages \
      apt-get -q install -y --no-install-recommends \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
COPY --from=build /out/bin/ /opt/gla-server/bin/
COPY deploy/models/bard-6m /models/bard-6m
ENV PATH=/opt/gla-server/bin:$PATH GLA_MODEL=/models/bard-6m
USER 10001:10001
WORKDIR /
EXPOSE 8001 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
  CMD ["/opt/gla-server/bin/gla", "health", "--timeout", "2"]
ENTRYPOINT ["/opt/gla-server/bin/gla-server"]
