# SPDX-License-Identifier: Apache-2.0
"""Random histories on a model that keeps prompts, each answer compared with one that is computed whole."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from optimum_chatglm_ov.architectures.registry import architecture_of
from optimum_chatglm_ov.runtime.reuse.files import CacheFileError


class ReuseFuzz:
    """Operations on models that share a store.

    Args:
        models: keep prompts; each operation takes one of them.
        reference: keeps none, and computes the same in full precision.
        folder: the models' prefix cache; `None`: they have none.
        files: folder for files of `save_cache`.
        seed: of everything that is random.
    """

    def __init__(self, models: list[Any], reference: Any, folder: Path | None, files: Path, seed: int):
        self.models, self.reference, self.folder, self.files = models, reference, folder, files
        self.random = random.Random(seed)
        self.architecture = architecture_of(reference.config)
        self.texts = [self._ids(self.random.randint(1, 150)) for _ in range(3)]
        self.saved: dict[Path, list[int]] = {}
        self.counts: dict[str, int] = {}
        self.asked = self.computed = 0
        """Tokens of the prompts of `generate`, and those of them that were computed."""

    def run(self, operations: int) -> None:
        """Raises AssertionError at the first difference."""
        ways = [self.answer] * 6 + [self.edit] * 4 + [self.batch, self.beams, self.whole_forward, self.go_on]
        ways += [self.save, self.load, self.damage, self.restart, self.own_masks, self.interrupt]
        for _ in range(operations):
            way = self.random.choice(ways)
            self.counts[way.__name__] = self.counts.get(way.__name__, 0) + 1
            way()

    def _ids(self, length: int) -> list[int]:
        return self.architecture.example_prompt(length + 2, self.random.randrange(1 << 30))[0, :length].tolist()

    def _prompt(self, text: list[int]) -> torch.Tensor:
        ends = self.architecture.example_prompt(2)[0].tolist() if self.architecture.has_two_positions else []
        return torch.tensor([text + ends])

    @property
    def model(self) -> Any:
        return self.random.choice(self.models)

    def edit(self) -> None:
        """Changes a history: goes on, takes back, says something else in the middle, or begins anew."""
        i = self.random.randrange(len(self.texts))
        text = self.texts[i]
        at = self.random.randint(0, len(text))
        new = {
            "longer": text + self._ids(self.random.randint(1, 60)),
            "shorter": text[: max(at, 1)],
            "changed": text[:at] + self._ids(3) + text[at + 3 :],
            "branch": self.random.choice(self.texts)[:at] + self._ids(self.random.randint(1, 40)),
        }
        self.texts[i] = new[self.random.choice(sorted(new))][:200]

    def answer(self) -> None:
        prompt = self._prompt(self.random.choice(self.texts))
        self._compare(prompt, torch.ones_like(prompt))

    def batch(self) -> None:
        rows = [self._prompt(self.random.choice(self.texts))[0] for _ in range(self.random.randint(2, 3))]
        longest = max(map(len, rows))
        ids = torch.stack([torch.cat((torch.zeros(longest - len(row), dtype=torch.long), row)) for row in rows])
        mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
        self._compare(ids, mask)

    def beams(self) -> None:
        prompt = self._prompt(self.random.choice(self.texts))
        self._compare(prompt, torch.ones_like(prompt), num_beams=2)

    def whole_forward(self) -> None:
        prompt = self._prompt(self.random.choice(self.texts))
        self._close(self.model(prompt).logits, self.reference(prompt).logits)

    def go_on(self) -> None:
        """Calls with `past_key_values`, some of which are taken back."""
        model, prompt = self.model, self._prompt(self.random.choice(self.texts))
        output = model(prompt, logits_to_keep=1)
        more = torch.tensor([self._ids(3)])
        model(more, past_key_values=output.past_key_values)
        output.past_key_values.crop(prompt.shape[1] + 1)
        found = model(more[:, 1:], past_key_values=output.past_key_values).logits
        self._close(found, self.reference(torch.cat((prompt, more), dim=1)).logits[:, -2:])

    def own_masks(self) -> None:
        """Calls whose masks hide what was there, or leave holes: nothing of them may be kept."""
        model, prompt = self.model, self._prompt(self.random.choice(self.texts))
        more, length = torch.tensor([self._ids(2)]), prompt.shape[1]
        mask = torch.ones((1, length + 2), dtype=torch.long)
        hidden = self.random.randint(1, max(length // 2, 1))
        mask[0, :hidden] = 0
        if self.architecture.has_two_positions or length < 3 or self.random.random() < 0.5:  # a mask that changes
            outputs = []
            for each in (model, self.reference):
                past = each(prompt, logits_to_keep=1).past_key_values
                outputs.append(each(more, attention_mask=mask, past_key_values=past).logits)
            self._close(*outputs)
        else:
            mask = mask[:, :length].flip(1)
            mask[0, -1] = 1
            found, expected = (
                each(prompt, attention_mask=mask, logits_to_keep=1).logits for each in (model, self.reference)
            )
            self._close(found, expected)
        if hidden < length and not self.architecture.has_two_positions:
            self.texts[self.random.randrange(len(self.texts))] = prompt[0, hidden:].tolist() + more[0].tolist()

    def interrupt(self) -> None:
        """A call that ends in the middle, at one of the places where it may."""
        model, prompt = self.model, self._prompt(self.random.choice(self.texts))
        model.compile()
        name = self.random.choice(["_infer", "_advance", "_prepare"])
        call, is_late = getattr(model.engine, name), self.random.random() < 0.5

        def interrupted(*arguments):
            if is_late:
                call(*arguments)
            raise KeyboardInterrupt

        past = model(prompt, logits_to_keep=1).past_key_values if self.random.random() < 0.5 else None
        setattr(model.engine, name, interrupted)
        try:
            ids = prompt if past is None else torch.tensor([self._ids(2)])
            model(ids, past_key_values=past, logits_to_keep=1)
        except KeyboardInterrupt:
            pass
        finally:
            delattr(model.engine, name)

    def save(self) -> None:
        model, prompt = self.model, self._prompt(self.random.choice(self.texts))
        model(prompt, logits_to_keep=1)
        file = self.files / f"{self.random.randrange(3)}.safetensors"
        model.save_cache(file)
        self.saved[file] = prompt[0].tolist()

    def load(self) -> None:
        if not self.saved:
            return
        file = self.random.choice(sorted(self.saved))
        ids = self.saved[file]
        model = self.model
        try:
            past = model.load_cache(file)
        except CacheFileError:
            assert file.with_suffix(".damaged").exists()
            return
        more = torch.tensor([self._ids(2)])
        found = model(more, past_key_values=past).logits
        self._close(found, self.reference(torch.cat((torch.tensor([ids]), more), dim=1)).logits[:, -2:])

    def damage(self) -> None:
        """Cuts, changes or empties a file, or puts one in the place of another."""
        files = sorted(self.folder.glob("*.safetensors")) if self.folder else []
        if not files:
            return
        file = self.random.choice(files)
        try:
            content = bytearray(file.read_bytes())
            at = self.random.randrange(max(len(content), 1))
            way = self.random.randrange(4)
            if way == 0:
                content = content[:at]
            elif way == 1 and content:
                content[at] ^= 1 << self.random.randrange(8)
            elif way == 2:
                content += b"x"
            else:
                content = self.random.choice(files).read_bytes()
            # a file that is mapped must not change under its reader: ours never do
            file.unlink()
            file.write_bytes(content)
        except FileNotFoundError:
            pass

    def restart(self) -> None:
        self.model.clear_requests()

    def _compare(self, ids: torch.Tensor, mask: torch.Tensor, **settings: Any) -> None:
        settings = {"max_new_tokens": self.random.randint(1, 3), "do_sample": False, "pad_token_id": 0, **settings}
        settings |= {"attention_mask": mask, "output_logits": True, "return_dict_in_generate": True}
        model = self.model
        model.compile()
        run, lengths = model.engine.run, []
        model.engine.run = lambda inputs: lengths.append(inputs["input_ids"].shape[1]) or run(inputs)
        try:
            found = model.generate(ids, **settings)
        finally:
            del model.engine.run
        self.asked, self.computed = self.asked + ids.shape[1], self.computed + lengths[0]
        expected = self.reference.generate(ids, **settings)
        assert torch.equal(found.sequences, expected.sequences)
        self._close(torch.stack(found.logits), torch.stack(expected.logits))

    def _close(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
