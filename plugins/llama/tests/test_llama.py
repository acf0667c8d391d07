"""Llama's block: multi-head and grouped-query, with and without biases. Aquila's and Yi's first releases bring code
that cannot be fetched here, so the smallest stand-ins with their module names take its place. Llama 4: dense layers and
mixtures, with images."""

from dataclasses import replace

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    Llama4Config,
    Llama4TextConfig,
    Llama4VisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    SmolLM3Config,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import awq_plugin_llama
from awq_core import api
from awq_core.config import QuantConfig
from awq_core.hooks.manager import PluginManager
from awq_core.runtime.load import load
from awq_core.testing import ArchitectureConformance, proof_error, save_tiny, tiny_tokenizer
from awq_core.testing.tiny import tiny_weights
from awq_plugin_llama import LLAMA4_TEXT
from awq_plugin_llama.experts import unstack_scored

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


IMAGE = 2  # id of "<image>" in the kit's tiny tokenizer


class AquilaConfig(LlamaConfig):
    model_type = "aquila"


class AquilaForCausalLM(LlamaForCausalLM):
    config_class = AquilaConfig


class YiConfig(LlamaConfig):
    model_type = "Yi"


class YiDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with the norms named `ln1` and `ln2`, as Yi's own modelling file did."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.ln1, self.ln2 = self.input_layernorm, self.post_attention_layernorm
        del self.input_layernorm, self.post_attention_layernorm

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.self_attn(self.ln1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.ln2(hidden_states))


class YiForCausalLM(LlamaForCausalLM):
    config_class = YiConfig

    def __init__(self, config):
        super().__init__(config)
        for index in range(config.num_hidden_layers):
            self.model.layers[index] = YiDecoderLayer(config, index)
        self.post_init()


def llama4_text(**options):
    """Rotation, and none with a temperature; dense, and a mixture; two experts a token."""
    return Llama4TextConfig(
        **{
            **TINY,
            "head_dim": 16,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "no_rope_layer_interval": 2,
            "floor_scale": 4,
            **options,
        }
    )


def llama4():
    vision = Llama4VisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        projector_input_dim=64,
        projector_output_dim=64,
        vision_output_dim=64,
        image_size=16,
        patch_size=4,
    )
    return Llama4Config(
        vision_config=vision,
        text_config=llama4_text(),
        image_token_index=IMAGE,
        architectures=["Llama4ForConditionalGeneration"],
    )


for config_class, model_class in ((AquilaConfig, AquilaForCausalLM), (YiConfig, YiForCausalLM)):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


class TestLlama(ArchitectureConformance):
    plugin = "awq_plugin_llama"

    @staticmethod
    def configs():
        return {
            "grouped-query": LlamaConfig(**TINY, num_key_value_heads=2),
            "multi-head-tied": LlamaConfig(**TINY, num_key_value_heads=4, tie_word_embeddings=True),
            "biases": LlamaConfig(**TINY, num_key_value_heads=4, attention_bias=True, mlp_bias=True),
            "smollm3": SmolLM3Config(**TINY, num_key_value_heads=2),
            "aquila": AquilaConfig(**TINY, num_key_value_heads=2),
            "yi": YiConfig(**TINY, num_key_value_heads=2),
            "llama4-text": llama4_text(),
            "llama4-text-mixtures-only": llama4_text(
                interleave_moe_layer_step=1, num_experts_per_tok=1, use_qk_norm=False
            ),
            "llama4": llama4(),
        }


def test_unstacked_experts_compute_what_the_stack_computes():
    config = llama4_text(interleave_moe_layer_step=1)
    stacked, unstacked = tiny_weights(config, seed=3), tiny_weights(config, seed=3)
    manager = PluginManager()
    manager.register(awq_plugin_llama, "llama")
    assert manager.prepare_model(manager.owner(config), unstacked)
    ids = torch.randint(0, 100, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, want = (model(input_ids=ids, output_router_logits=True) for model in (unstacked, stacked))
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.router_logits, want.router_logits)
    assert isinstance(unstacked.get_submodule("model.layers.0.feed_forward.experts.2.up_proj"), torch.nn.Linear)


def test_experts_are_calibrated_on_inputs_with_their_score():
    """All tokens while calibrating, each with the score it has for the expert, whether it is sent there or not."""
    config = llama4_text(interleave_moe_layer_step=1)
    model = tiny_weights(config)
    manager = PluginManager()
    manager.register(awq_plugin_llama, "llama")
    manager.prepare_model(manager.owner(config), model)
    mixture = model.get_submodule("model.layers.0.feed_forward")
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    seen, gates = [], []
    mixture.experts.get_submodule("3.gate_proj").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mixture.experts.register_forward_pre_hook(lambda module, args: gates.append(module.gate_weights("3", *args)))
    logits = x @ mixture.router.weight.T
    sent = (logits.argsort(-1, descending=True)[:, :2] == 3).any(-1)
    with torch.no_grad():
        mixture(x)
        torch.testing.assert_close(seen[0], (x * logits[:, 3:].sigmoid())[sent])
        torch.testing.assert_close(gates[0], sent.float())
        mixture.experts.calibrating = {"3"}
        mixture(x)
    torch.testing.assert_close(seen[1], x * logits[:, 3:].sigmoid())


def test_a_router_or_shared_expert_left_out_fails_the_proof():
    mixture = next(group for group in LLAMA4_TEXT.scale_groups if group.compensate)
    shared = tuple(path for path in mixture.layers if "shared" not in path)
    for wrong in (replace(mixture, compensate=()), replace(mixture, layers=shared)):
        groups = [wrong if group is mixture else group for group in LLAMA4_TEXT.scale_groups]
        assert proof_error(llama4_text(), LLAMA4_TEXT, groups, prepare=unstack_scored) > 0.02


class Processor:
    """Stands in for Llama 4's, whose image processor needs torchvision: one tile an image, a token for four patches."""

    def __init__(self):
        self.tokenizer, self.image_token = tiny_tokenizer(), "<image>"
        side = {"height": 16, "width": 16}
        self.images = CLIPImageProcessorPil(size=side, crop_size=side)

    def __call__(self, text, images, return_tensors):
        text = text if isinstance(text, str) else text[0]
        tokens = self.tokenizer(text.replace("<image>", "<image>" * 4), return_tensors=return_tensors)
        return {**tokens, **self.images(images, return_tensors=return_tensors)}


def test_llama4_with_images(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(llama4(), source)
    generator = torch.Generator().manual_seed(0)
    noise = [(torch.rand(16, 16, 3, generator=generator) * 255).byte().numpy() for _ in range(3)]
    samples = [{"text": f"picture {i}", "images": [Image.fromarray(noise[i])]} for i in range(3)]
    settings = QuantConfig(group_size=32, components={"vision": "4bit", "projector": "4bit"})
    result = api.quantize(source, out, config=settings, calibration=samples, tokenizer=Processor(), samples=3)
    (projector,) = (report for report in result.reports if report.name.startswith("multi_modal_projector."))
    assert projector.tokens == 3 * 4
    vision = [report for report in result.reports if report.name.startswith("vision_model.")]
    language = [report for report in result.reports if report.name.startswith("language_model.")]
    assert len(vision) == 2 * 6 and all(report.tokens == 3 * 17 for report in vision)  # patches and the class token
    assert len(language) == 7 + 4 + 3 * (1 + 4)
    assert all(report.tokens == result.calibration.tokens for report in language)

    batch = Processor()("<image>what?", samples[0]["images"], "pt")
    with torch.no_grad():
        got, want = load(out)(**batch).logits, load(out, fake_quant=True)(**batch).logits
    assert float((got - want).norm() / want.norm()) < 1e-4
    made = load(out).generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape[1] > batch["input_ids"].shape[1]
