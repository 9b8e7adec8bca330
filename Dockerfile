# thresher from its wheel: run `make dist` first, then
#   docker build -t thresher .
#   docker run --rm -v "$PWD:/data" -u "$(id -u):$(id -g)" thresher select random pool -o out --keep 30%
FROM python:3.13-slim
COPY dist/*.whl /tmp/dist/
RUN pip install --no-cache-dir /tmp/dist/*.whl \
    && rm -r /tmp/dist \
    && useradd --create-home --uid 1000 thresher \
    && mkdir /cache /data \
    && chown thresher /cache /data \
    && chmod 1777 /cache
ENV THRESHER_CACHE=/cache
USER thresher
WORKDIR /data
VOLUME ["/cache"]
ENTRYPOINT ["thresher"]
CMD ["--help"]
