"""The same few prompts completed again and again while a run goes on: what the numbers mean, in words."""

from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.errors import UserError
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.hardware import distributed
from gemma_tpu.sampling import sampler
from gemma_tpu.schema import EvalConfig
from gemma_tpu.step import step


class Previews:
    """Greedy, so that two of them differ only where the model does."""

    def __init__(self, section: EvalConfig, model_path: str, arch: Architecture):
        self.prompts = section.prompts
        self.note: str | None = None
        if self.prompts and distributed.count() > 1:
            self.note = "eval.prompts are not completed on several hosts; `gemma-tpu sample` does it afterwards"
            self.prompts = ()
        self._settings = sampler.Settings(max_new_tokens=section.max_new_tokens)
        if not self.prompts:
            return
        self._tokenizer = Tokenizer(model_path)
        self._ids = [self._tokenizer.prompt([{"role": "user", "content": prompt}]) for prompt in self.prompts]
        longest = max(map(len, self._ids)) + section.max_new_tokens
        if longest > arch.context:
            raise UserError(f"eval.prompts: the longest and its completion have {longest} tokens, more than the "
                            f"model's context of {arch.context}; shorten it, or eval.max_new_tokens")  # fmt: skip

    def make(self, parts: step.Parts, trained: step.Trained) -> list[tuple[str, str]]:
        """(prompt, completion) of each prompt by the model as it is now."""
        if not self.prompts:
            return []
        model = parts.merge(trained, parts.frozen)
        made = sampler.generate(model, self._ids, self._tokenizer.stop_ids, self._settings, rows=len(self._ids))
        texts = (self._tokenizer.decode(one.tokens) for one in made)
        return list(zip(self.prompts, texts, strict=True))
