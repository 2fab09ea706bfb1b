# A second way to run the study, for machines with Docker or Podman; see docs/environments.md.
# Set-up and study are the README's: `make setup` while building, `make figures` inside.
FROM python:3.11-slim-bookworm

# The Java sources of the default study; without, it would fetch this package each time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make openjdk-17-source \
    && rm -rf /var/lib/apt/lists/*

# Results in a mounted folder belong to this user: give your own, `--build-arg UID=$(id -u)`.
ARG UID=1000
RUN useradd --create-home --uid "$UID" study \
    && install --directory --owner=study /greencode /greencode/results /greencode/logs
WORKDIR /greencode
USER study

# cpu, or cu130 for CUDA: which build of torch uv installs.
ARG TORCH=cpu
ENV UV_TORCH_BACKEND=$TORCH UV_NO_CACHE=1

# Before the code, so that an edit of it does not install everything again.
COPY --chown=study requirements.in requirements.lock Makefile ./
COPY --chown=study envs envs
RUN make setup

COPY --chown=study . .
CMD ["make", "figures"]
