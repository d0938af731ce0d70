"""The workload behind LitServe: ``python -m benchmarks.peers.lit PORT``."""

from __future__ import annotations

import sys
from typing import Any

import litserve

from benchmarks.peers import bodies, workloads

workload = workloads.chosen()


class Model(litserve.LitAPI):
    """A model whose ``predict`` takes a batch, where the workload has one."""

    def setup(self, device: str) -> None:
        self.model = bodies.load(workload)

    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return request["values"][0]

    def predict(self, values: Any) -> Any:
        return self.model(values) if workload.has_model else values

    def encode_response(self, output: Any) -> list[Any]:
        return [output]


class Io(litserve.LitAPI):
    """Asynchronous I/O."""

    def setup(self, device: str) -> None:
        pass

    async def decode_request(self, request):  # type: ignore[no-untyped-def]
        return request["values"][0]

    async def predict(self, value: Any) -> Any:
        return await bodies.io(value)

    async def encode_response(self, output: Any) -> list[Any]:
        return [output]


if __name__ == "__main__":
    if workload.name == "io":
        api: litserve.LitAPI = Io(enable_async=True, api_path="/infer")
    else:
        wait = workload.wait_ms / 1000 if workload.has_model else 0.0
        api = Model(max_batch_size=workload.max_batch, batch_timeout=wait, api_path="/infer")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=600)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning"
    )
