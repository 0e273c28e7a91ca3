"""The peer ctranslate2: run models in float32 or int8, because CTranslate2 does not support bfloat16 on CPUs."""

import time

import ctranslate2

from peers import Answer, Job


class CTranslate2:
    def __init__(self, job: Job) -> None:
        self.generator = ctranslate2.Generator(job.ctranslate2, device="cpu", inter_threads=1, intra_threads=job.threads)

    def generate(self, prompts: list[list[int]], new: int) -> Answer:
        start = time.perf_counter()
        rows_without_token, first = set(range(len(prompts))), 0.0

        def on_step(step: ctranslate2.GenerationStepResult) -> bool:
            nonlocal first
            if rows_without_token:
                rows_without_token.discard(step.batch_id)
                first = time.perf_counter()
            return False  # returning True would end the generation

        words = [[str(token) for token in p] for p in prompts]  # convert.py wrote a vocabulary in which token 5 is "5"
        # With include_prompt_in_result=False, CTranslate2 prefills all rows at once, up to the end of the shortest prompt.
        results = self.generator.generate_batch(
            words, max_length=new, end_token=[], include_prompt_in_result=False, callback=on_step
        )
        tokens = [result.sequences_ids[0] for result in results]
        return Answer(first - start, time.perf_counter() - first, tokens)
