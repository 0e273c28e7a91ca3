"""The peer openvino: run models with the continuous batching pipeline of OpenVINO GenAI, which LLMPipeline also uses on CPUs.

Settings that this module does not change keep OpenVINO's defaults: bfloat16 arithmetic on CPUs that support it, an 8-bit KV
cache, and, in quantized layers, activations that are rounded to 8 bits in groups.
"""

import sys
import time

import openvino
import openvino_genai

from peers import Answer, Job


class OpenVino:
    def __init__(self, job: Job) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False  # repeated measurements must compute the prompts again
        scheduler.max_num_batched_tokens = sys.maxsize  # prefill all prompts in one step, as LLMPipeline does
        properties: dict[str, int | str] = {"INFERENCE_NUM_THREADS": job.threads}
        if job.dtype == "float32":  # by default, OpenVINO may compute in bfloat16
            properties["INFERENCE_PRECISION_HINT"] = "f32"
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(job.openvino, scheduler, "CPU", properties)

    def generate(self, prompts: list[list[int]], new: int) -> Answer:
        # OpenVINO requires an eos_token_id, even with ignore_eos.
        config = openvino_genai.GenerationConfig(max_new_tokens=new, eos_token_id=0, ignore_eos=True)
        pipeline = self.pipeline
        start = time.perf_counter()
        inputs = [openvino.Tensor([p]) for p in prompts]
        rows = [pipeline.add_request(i, tokens, config) for i, tokens in enumerate(inputs)]
        while not all(row.can_read() for row in rows):
            pipeline.step()
        first = time.perf_counter()
        while pipeline.has_non_finished_requests():
            pipeline.step()
        end = time.perf_counter()
        return Answer(first - start, end - first, [row.read_all()[0].generated_ids for row in rows])
