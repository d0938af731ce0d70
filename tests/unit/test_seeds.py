"""The examples that teams bring along, as they are written but for the import line.

Torch, transformers and the models of the examples have stand-ins here: what is tested is that the
code around them runs. Where an example leaves a body out, the test has one.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import types
from collections.abc import Iterator

import pytest
from celery import Celery

import gw_celery as gw
from gw_celery import testing


class Weights:
    """Stands in for a model: whatever it is asked, it notes and answers."""

    device = "cpu"

    def cuda(self) -> Weights:
        self.device = "cuda"
        return self

    def __call__(self, text: str) -> str:
        return f"{text} on {self.device}"

    def generate(self, **inputs: str) -> list[str]:
        return [inputs["tokens"].upper()]

    def encode(self, texts: list[str]) -> Rows:
        return Rows(texts)

    async def aencode(self, text: str) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(text))]

    def predict(self, text: str) -> float:
        return 0.6 if "great" in text else 0.1

    def shutdown_background_loop(self) -> None:
        self.device = "shut down"


class Rows:
    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def tolist(self) -> list[list[float]]:
        return [[float(len(text))] for text in self._texts]


class Tokens(dict):
    def to(self, device: str) -> Tokens:
        return self


class TokenizerStandIn:
    def __call__(self, text: str, return_tensors: str) -> Tokens:
        return Tokens(tokens=text)

    def decode(self, tokens: str) -> str:
        return f"<{tokens}>"


@pytest.fixture(autouse=True)
def _libraries(monkeypatch) -> None:
    weights = Weights()

    def pretrained(made: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(from_pretrained=lambda name: made)

    libraries = {
        "torch": {
            "load": lambda path: weights,
            "device": lambda name: name,
            "cuda": types.SimpleNamespace(empty_cache=lambda: None),
        },
        "transformers": {
            "AutoTokenizer": pretrained(TokenizerStandIn()),
            "AutoModelForCausalLM": pretrained(weights),
        },
        "vllm": {
            "AsyncEngineArgs": lambda **given: given,
            "AsyncLLMEngine": types.SimpleNamespace(from_engine_args=lambda args: weights),
        },
        "sentence_transformers": {"SentenceTransformer": lambda name: weights},
    }
    for name, names in libraries.items():
        module = types.ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)


@contextlib.contextmanager
def deployed(app: gw.App) -> Iterator[None]:
    with testing.in_process(app):
        yield


def test_a_context_loads_a_model_for_a_remote_function(app) -> None:
    @app.context()
    class MyModel:
        async def __aenter__(self):
            import torch

            self.model = torch.load("model.pt").cuda()
            self.device = torch.device("cuda")
            return self

        async def __aexit__(self, *exc):
            del self.model  # Cleanup on shutdown

    @app.remote(benchmark_dataset=[{"text": "hello"}])
    async def predict(text: str) -> dict:
        ctx = app.get_context(MyModel)
        result = ctx.model(text)
        return {"prediction": result}

    with deployed(app):
        assert predict.remote("hello") == {"prediction": "hello on cuda"}
        entered = app.get_context(MyModel)
    assert not hasattr(entered, "model")


def test_arguments_reach_the_constructor_of_a_context(app) -> None:
    @app.context("Qwen/Qwen3-0.6B", max_len=512)
    class LLMEngine:
        def __init__(self, model_name, max_len=1024):
            self.model_name = model_name
            self.max_len = max_len

        async def __aenter__(self):
            from vllm import AsyncEngineArgs, AsyncLLMEngine

            args = AsyncEngineArgs(model=self.model_name, max_model_len=self.max_len)
            self.engine = AsyncLLMEngine.from_engine_args(args)
            return self

        async def __aexit__(self, *exc):
            self.engine.shutdown_background_loop()

    @app.remote(benchmark_dataset=[{"prompt": "Hello"}])
    async def generate(prompt: str, max_tokens: int = 128) -> str:
        engine = app.get_context(LLMEngine)
        return f"{engine.model_name}: {prompt} {engine.max_len} {max_tokens}"

    with deployed(app):
        engine = app.get_context(LLMEngine).engine
        assert generate.remote("Hello") == "Qwen/Qwen3-0.6B: Hello 512 128"
    assert engine.device == "shut down"


def test_several_contexts_serve_one_function(app) -> None:
    @app.context()
    class Tokenizer:
        async def __aenter__(self):
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained("gpt2")
            return self

        async def __aexit__(self, *exc):
            pass

    @app.context()
    class Model:
        async def __aenter__(self):
            from transformers import AutoModelForCausalLM

            self.model = AutoModelForCausalLM.from_pretrained("gpt2").cuda()
            return self

        async def __aexit__(self, *exc):
            pass

    @app.remote(benchmark_dataset=[{"text": "Hello"}])
    async def generate(text: str) -> str:
        tok = app.get_context(Tokenizer)
        model = app.get_context(Model)
        inputs = tok.tokenizer(text, return_tensors="pt").to("cuda")
        outputs = model.model.generate(**inputs)
        return tok.tokenizer.decode(outputs[0])

    with deployed(app):
        assert generate.remote("Hello") == "<HELLO>"


def test_contexts_enter_in_parallel(app) -> None:
    met = asyncio.Barrier(2)

    @app.context()
    class First:
        async def __aenter__(self):
            await met.wait()  # each needs the other to be entering
            return self

        async def __aexit__(self, *exc):
            await met.wait()

    @app.context()
    class Second(First):
        pass

    @app.remote
    async def both():
        return type(app.get_context(First)).__name__, type(app.get_context(Second)).__name__

    with deployed(app):
        assert both.remote() == ("First", "Second")


def test_get_context_raises_a_key_error_before_the_entry(app) -> None:
    @app.context()
    class MyModel:
        async def __aenter__(self):
            return self

        async def __aexit__(self, *exc):
            pass

    with pytest.raises(KeyError):
        app.get_context(MyModel)
    with pytest.raises(KeyError):
        app.get_context(object)


def test_a_client_awaits_a_remote_function(app) -> None:
    @app.remote(benchmark_dataset=[{"x": 2}])
    async def square(x):
        return x * x

    async def main():
        result = await square(5)  # Returns 25
        print(result)
        return result

    with deployed(app):
        assert asyncio.run(main()) == 25


def test_a_benchmark_is_a_dataset_or_a_generator(app) -> None:
    @app.remote(benchmark_dataset=[{"x": 2}, {"x": 100}, {"x": -5}])
    async def square(x):
        return x * x

    def gen_input():
        return {"x": random.randint(1, 1000)}

    @app.remote(benchmark_generator=gen_input, benchmark_runs=20)
    async def cube(x):
        return x * x * x

    with deployed(app):
        assert (square.remote(3), cube.remote(3)) == (9, 27)


@gw.register_type
class Note:
    """A custom object with a ``__dict__``."""

    def __init__(self, text: str) -> None:
        self.text = text


def test_the_promised_types_travel(app) -> None:
    @app.remote
    async def echo(value, note: Note) -> Note:
        return value, note

    value = (1, "a", 1.5, True, None, b"\x00\xff", [1, (2,)], {"k": [b"v"]})
    with deployed(app):
        answer, note = echo.remote(value, Note("x"))
    assert answer == value
    assert type(note) is Note
    assert vars(note) == {"text": "x"}


def test_errors_of_a_remote_function_are_raised_again(app) -> None:
    @app.remote
    async def fail():
        raise LookupError("no such model")

    with deployed(app), pytest.raises(LookupError, match="no such model"):
        fail.remote()


@pytest.fixture
def named() -> gw.App:
    return gw.App(
        "inference-server",
        celery=Celery("inference", broker="memory://", set_as_current=False),
    )


def test_an_embedder_loads_once_and_serves_many(named) -> None:
    app = named

    @app.cls(gpu=gw.Gpu("A100"), min_workers=1)
    class Embedder:
        @gw.on_enter()
        def setup(self):
            from sentence_transformers import SentenceTransformer

            self.model = SentenceTransformer("all-MiniLM-L6-v2")

        @gw.method()
        def embed(self, texts: list[str]) -> list[list[float]]:
            return self.model.encode(texts).tolist()

    with deployed(app):
        assert Embedder().embed.remote(["a", "bb"]) == [[1.0], [2.0]]


def load_model(path):
    return Weights()


load_embedding_model = Weights


def test_hooks_may_be_asynchronous(app) -> None:
    unloaded: list[bool] = []

    @app.cls(gpu=gw.Gpu("H100"))
    class LLMServer:
        @gw.on_enter()
        async def load(self):
            import torch

            self.model = load_model("/models/llama-3")
            self.model.cuda()
            self.torch = torch

        @gw.on_exit()
        async def unload(self):
            del self.model
            self.torch.cuda.empty_cache()
            unloaded.append(True)

        @gw.method()
        async def generate(self, prompt: str) -> str:
            return self.model.generate(tokens=prompt)[0]

    with deployed(app):
        assert LLMServer().generate.remote("hello") == "HELLO"
    assert unloaded == [True]


def test_concurrent_inputs(app) -> None:
    @app.cls(gpu=gw.Gpu("A100"))
    @gw.concurrent(max_inputs=16)
    class EmbedServer:
        @gw.on_enter()
        def load(self):
            self.model = load_embedding_model()

        @gw.method()
        async def embed(self, text: str) -> list[float]:
            return await self.model.aencode(text)

    async def main():
        return await asyncio.gather(*(EmbedServer().embed("a" * n) for n in range(4)))

    with deployed(app):
        assert asyncio.run(main()) == [[0.0], [1.0], [2.0], [3.0]]


def test_batching_without_a_batcher_gives_lists_of_one(app) -> None:
    @app.cls(gpu=gw.Gpu("A100"))
    @gw.concurrent(max_inputs=128)
    class BatchEmbedder:
        @gw.on_enter()
        def load(self):
            self.model = load_embedding_model()

        @gw.method()
        @gw.batched(max_batch_size=64, wait_ms=20)
        def embed(self, texts: list[str]) -> list[list[float]]:
            return self.model.encode(texts).tolist()

    with deployed(app):
        assert BatchEmbedder().embed.remote("abc") == [3.0]


def test_health_probes(app) -> None:
    @app.cls(
        gpu=gw.Gpu("A100"),
        probes=[gw.Probe.on("health", kind="liveness", period_s=30, failures=3)],
    )
    class Model:
        model = Weights()

        @gw.method()
        def health(self) -> dict:
            return {"ok": self.model is not None}

        @gw.method()
        def predict(self, x: list[float]) -> float: ...

    with deployed(app):
        assert Model().health.remote() == {"ok": True}


def test_runtime_parameters(app) -> None:
    @app.cls(gpu=gw.Gpu("A100"))
    class Classifier:
        threshold: float = gw.parameter(default=0.5)
        model = Weights()

        @gw.method()
        def classify(self, text: str) -> str:
            score = self.model.predict(text)
            return "positive" if score > self.threshold else "negative"

    with deployed(app):
        # Call with a custom threshold
        result = Classifier(threshold=0.7).classify.remote("great product!")
        assert result == "negative"
        assert Classifier().classify.remote("great product!") == "positive"
