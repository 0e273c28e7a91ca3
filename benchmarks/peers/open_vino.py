"""OpenVINO GenAI, by its pipeline for continuous batching, which is what its LLMPipeline runs on a CPU.

What is not set here is as OpenVINO has it by default: on CPUs that multiply bfloat16 it computes in it, keys and values are
kept in 8 bit, and the activations of quantized layers are rounded to 8 bit in groups.
"""

import sys
import time

import openvino
import openvino_genai

from peers import Answer, Job


class OpenVino:
    def __init__(self, job: Job) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False  # a prompt that is measured again must be read again
        scheduler.max_num_batched_tokens = sys.maxsize  # prompts are read at once, as LLMPipeline reads them
        properties: dict[str, int | str] = {"INFERENCE_NUM_THREADS": job.threads}
        if job.dtype == "float32":  # which bfloat16 would not be a match for
            properties["INFERENCE_PRECISION_HINT"] = "f32"
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(job.openvino, scheduler, "CPU", properties)

    def generate(self, prompts: list[list[int]], new: int) -> Answer:
        # It wants some id for the end, even where it is not to heed it.
        config = openvino_genai.GenerationConfig(max_new_tokens=new, eos_token_id=0, ignore_eos=True)
        pipeline = self.pipeline
        begun = time.perf_counter()
        inputs = [openvino.Tensor([p]) for p in prompts]
        rows = [pipeline.add_request(i, ids, config) for i, ids in enumerate(inputs)]
        while not all(row.can_read() for row in rows):
            pipeline.step()
        first = time.perf_counter()
        while pipeline.has_non_finished_requests():
            pipeline.step()
        ended = time.perf_counter()
        return Answer(first - begun, ended - first, [row.read_all()[0].generated_ids for row in rows])
