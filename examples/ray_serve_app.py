# SPDX-License-Identifier: Apache-2.0
"""Serves a model on many machines: Ray Serve hosts the application of `chatglm-ov serve`.

    pip install "optimum-chatglm-ov[ray]"
    serve run examples.ray_serve_app:app model=/models/chatglm3-6b-ov cores=16 max_replicas=8
    curl http://127.0.0.1:8000/health

Each replica takes cores of one NUMA node for itself; Ray starts more replicas while requests wait, and replaces one
whose process or engine has ended. Without `model`, the tiny one that comes with the package answers.
"""

from __future__ import annotations

from typing import Any

from optimum_chatglm_ov.serving.extras import require


require("ray")
from ray import serve  # noqa: E402


def app(arguments: dict[str, str]) -> serve.Application:
    """What `serve run` starts.

    Args:
        arguments: `model` (an exported folder that every machine has), `name`, `cores` (of a replica),
            `max_running` (answers at once in a replica), `min_replicas`, `max_replicas`.
    """
    folder, name = arguments.get("model"), arguments.get("name")
    cores = int(arguments.get("cores", "1"))
    max_running = int(arguments.get("max_running", "32"))

    def build() -> Any:
        """The application, made inside a replica."""
        from optimum_chatglm_ov.cli.embedded import embedded_model
        from optimum_chatglm_ov.serving.app import create_app
        from optimum_chatglm_ov.serving.engine import EngineOptions
        from optimum_chatglm_ov.serving.model import ServerOptions
        from optimum_chatglm_ov.serving.numa import take_cores

        take_cores(cores)
        engine_options = EngineOptions(max_running=max_running, max_waiting=4 * max_running)
        if folder is not None:
            return create_app(folder, ServerOptions(name=name), engine_options)
        with embedded_model() as embedded:
            return create_app(embedded, ServerOptions(name=name or "tiny-chatglm3", greedy=True), engine_options)

    @serve.ingress(build)
    class Replica:
        def check_health(self) -> None:
            problem = self.app.state.model.engine.problem()
            if problem:
                raise RuntimeError(problem)

    deployment = serve.deployment(
        Replica,
        name="chatglm",
        ray_actor_options={"num_cpus": cores},
        autoscaling_config={
            "min_replicas": int(arguments.get("min_replicas", "1")),
            "max_replicas": int(arguments.get("max_replicas", "1")),
            "target_ongoing_requests": max_running,
        },
        max_ongoing_requests=4 * max_running,
        health_check_period_s=5,
    )
    return deployment.bind()
