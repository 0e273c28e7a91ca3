"""CTranslate2, by its Generator. A CPU gets float32 or int8 from it: it knows no bfloat16 there."""

import time

import ctranslate2

from peers import Answer, Job


class CTranslate2:
    def __init__(self, job: Job) -> None:
        self.generator = ctranslate2.Generator(job.ctranslate2, device="cpu", inter_threads=1, intra_threads=job.threads)

    def generate(self, prompts: list[list[int]], new: int) -> Answer:
        begun = time.perf_counter()
        waiting, first = set(range(len(prompts))), 0.0

        def made(step: ctranslate2.GenerationStepResult) -> bool:
            nonlocal first
            if waiting:
                waiting.discard(step.batch_id)
                first = time.perf_counter()
            return False  # go on

        tokens = [[str(id_) for id_ in p] for p in prompts]  # the vocabulary that convert.py gives it
        # Ids enter at once, up to the end of the shortest prompt, only where they are not part of the result.
        results = self.generator.generate_batch(
            tokens, max_length=new, end_token=[], include_prompt_in_result=False, callback=made
        )
        ids = [result.sequences_ids[0] for result in results]
        return Answer(first - begun, time.perf_counter() - first, ids)
