"""From the configuration to megatron-core's GPTModel, by specs: our attention, norm, rotary angles and head.

What differs from GPTModel: the forward pass reads a `Batch`, rotary angles follow `position_ids`, the mask is the
token roles (in `AttentionInputs`, handed to the layers as `attention_bias`), and the head runs only on tokens that
carry a loss. Parameters, their names and their checkpoints are GPTModel's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dllm.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.losses.distillation import DistillRule
from megatron_dllm.diffusion.losses.outputs import TargetOutputs
from megatron_dllm.model.alignment import Alignment, LayerAlignment, StateRecorder, find_pairs
from megatron_dllm.model.asked import NOTHING, Asked
from megatron_dllm.model.attention.annealing import Opening, PlacedOpening
from megatron_dllm.model.attention.backends import BACKENDS, Backend
from megatron_dllm.model.attention.inputs import AttentionPlanner
from megatron_dllm.model.attention.kv_cache import CachedPass
from megatron_dllm.model.dispatch import use_gathers
from megatron_dllm.model.distillation import Teacher, distilled_cross_entropy
from megatron_dllm.model.embedding import mask_noise_std, mean_row_norm, token_normals
from megatron_dllm.model.forgetting import forget_after_use
from megatron_dllm.model.head import target_cross_entropy
from megatron_dllm.model.last_layer import LastLayer, can_skip_outputs, flat_rows, rows_to_keep
from megatron_dllm.model.layer_specs import block_spec
from megatron_dllm.model.megatron_config import transformer_config
from megatron_dllm.model.paths import Paths, choose_paths
from megatron_dllm.model.rotary import rotary_angles
from megatron_dllm.model.token_share import TokenShare, find_before_targets
from megatron_dllm.model.weights import weight_of
from megatron_dllm.parallel.device import DeviceFacts, local_device
from megatron_dllm.parallel.groups import Groups


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    groups: Groups,
    *,
    vp_stage: int | None = None,
    paths: Paths | None = None,
    training: TrainingConfig | None = None,
    backends: Mapping[str, Backend] = BACKENDS,
) -> DiffusionGPTModel:
    """This rank's part of the model, with random weights.

    Args:
        model: sizes and ids.
        parallel: layout and precision.
        groups: of this layout; they say whether this part holds the embedding and the head.
        vp_stage: virtual pipeline stage, with interleaved pipelines.
        paths: the implementations; None: those chosen for this process's device.
        training: how it is trained; None: the defaults.
        backends: of attention, by name.

    Returns:
        The model on this rank's device, in fp32 or bf16 parameters by parallel.precision.
    """
    training = training or TrainingConfig()
    paths = paths or choose_paths(model, parallel, DeviceFacts.here(), training.attention_backend)
    config = transformer_config(model, parallel, paths, training)
    built = DiffusionGPTModel(
        model,
        config,
        block_spec(
            config,
            paths,
            vp_stage,
            can_skip_outputs(model, config, training),
            groups.tensor if model.qk_layernorm_spans_heads else None,
        ),
        AttentionPlanner(backends[paths.attention.name], groups.context, config.cp_comm_type == "a2a"),
        pre_process=groups.is_first_stage(vp_stage),
        post_process=groups.is_last_stage(vp_stage),
        vp_stage=vp_stage,
    ).to(local_device())
    if paths.experts.name in ("grouped", "sections"):
        use_gathers(built)
    forget_after_use(built)
    return built


class DiffusionGPTModel(GPTModel):
    """GPTModel whose forward pass reads a `Batch` and returns the loss of its targets.

    Attributes:
        attention: makes the inputs of a micro-batch's attention layers.
        skips_outputs: the last layer is here and computes only the tokens whose output is read.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules,
        attention: AttentionPlanner,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            position_embedding_type="none",
            vp_stage=vp_stage,
        )
        self.model_config = replace(model)
        self.attention = attention
        self.skips_outputs = post_process and isinstance(self.decoder.layers[-1], LastLayer)

    def forward(
        self,
        batch: Batch,
        mask_noise_sigma: float = 0.0,
        noise_seed: int = 0,
        entropy_temperature: float | None = None,
        asked: Asked = NOTHING,
        opening: Opening | None = None,
    ) -> Tensor | TargetOutputs | Teacher:
        """Negative log-likelihood of the batch's targets.

        Args:
            batch: one micro-batch; under context parallelism this rank's shard of it.
            mask_noise_sigma: noise on the embedding of masked tokens, as a fraction of the mean row norm;
                only while training.
            noise_seed: seed of that noise, and of the mask's random pairs; another value per step gives independent
                draws.
            entropy_temperature: also compute the entropy of each prediction at this temperature, and its largest
                probability; None: neither.
            asked: what is wanted beside the NLL.
            opening: how far the mask is open, in rows of one-block documents; None: all of it.

        Returns:
            On the last pipeline stage the outputs of the T targets, or what teaches those of `asked.students`; else
            the hidden states [s/(cp x tp), b, h] for the next stage (s/cp without sequence parallelism).
        """
        hidden = self._embed(batch, mask_noise_sigma, noise_seed) if self.pre_process else None
        after_layer = None if asked.alignment is None else self._aligning(batch, asked.alignment, asked.students)
        hidden, is_kept = self._run_layers(
            hidden,
            batch.position_ids,
            batch.roles,
            None if asked.needs_all_outputs else batch.target_positions,
            after_layer=after_layer,
            opening=None if opening is None else PlacedOpening.of(opening, noise_seed, batch),
        )
        if not self.post_process:
            return hidden
        weight, ids = self._head_weight(), batch.target_ids
        if asked.students is not None:
            return hidden if asked.distill is None else self._teach(hidden, batch, asked.students, asked.distill)
        chosen = self._select(hidden, batch.target_positions, is_kept)
        if asked.distill is None:
            return target_cross_entropy(chosen, weight, ids, self.tp_group, entropy_temperature=entropy_temperature)
        teacher = asked.teacher or self._teach(hidden, batch, batch, asked.distill)
        return distilled_cross_entropy(chosen, weight, ids, teacher, self.tp_group, asked.distill.top_k)

    def states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        roles: Tensor,
        positions: Tensor,
        cached: CachedPass | None = None,
    ) -> Tensor:
        """What the head reads of chosen tokens; before the last pipeline stage, what the next stage reads of all.

        Args:
            input_ids: [b, s] tokens.
            position_ids: [b, s] positions in the documents.
            roles: [b, s, 3] token roles.
            positions: [P] indexes into the flattened [b * s] tokens.
            cached: the tokens that these come behind (`KVCache.open`); None: these are all.

        Returns:
            [P, h] hidden states, or [s, b, h] (s/tp with sequence parallelism) for the next stage.
        """
        hidden = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        return self._decode(hidden, position_ids, roles, positions, cached)

    def head_logits(self, states: Tensor) -> Tensor:
        """[P, v] logits, gathered over the tensor ranks, of hidden states [P, h]."""
        local = torch.matmul(states, self._head_weight().t())
        return tensor_parallel.gather_from_tensor_model_parallel_region(local, group=self.tp_group)

    def _embed(self, batch: Batch, mask_noise_sigma: float, noise_seed: int) -> Tensor:
        """[s/(cp x tp), b, h] embeddings, with noise on masked tokens."""
        hidden = self.embedding(input_ids=batch.input_ids, position_ids=batch.position_ids)
        if mask_noise_sigma <= 0.0 or not self.training:
            return hidden
        tokens = slice(None)
        if self.config.sequence_parallel:
            length = hidden.shape[0]
            tokens = slice(self.tp_group.rank() * length, (self.tp_group.rank() + 1) * length)
        normals = token_normals(
            noise_seed, batch.row_keys, batch.roles[:, tokens], batch.position_ids[:, tokens], hidden.shape[-1]
        )
        norm = mean_row_norm(self.embedding.word_embeddings.weight, self.vocab_size, self.tp_group)
        std = mask_noise_std(mask_noise_sigma, norm, hidden.shape[-1])
        noise = torch.where(batch.is_masked[:, tokens].unsqueeze(-1), normals * std, 0.0)
        return hidden + noise.transpose(0, 1).to(hidden.dtype)

    def _decode(
        self,
        hidden: Tensor | None,
        position_ids: Tensor,
        roles: Tensor,
        positions: Tensor,
        cached: CachedPass | None = None,
    ) -> Tensor:
        """[P, h] hidden states of the flat `positions` in [b * s] on the last pipeline stage, else those of all tokens.

        Args:
            hidden: [s/(cp x tp), b, h] embeddings; None where a previous stage has set the input tensor.
            position_ids: [b, s] positions in the documents.
            roles: [b, s, 3] token roles.
            positions: [P] indexes into the flattened [b * s] tokens whose output is read.
            cached: a pass of the KV cache.
        """
        hidden, is_kept = self._run_layers(hidden, position_ids, roles, positions, cached)
        return self._select(hidden, positions, is_kept) if self.post_process else hidden

    def _run_layers(
        self,
        hidden: Tensor | None,
        position_ids: Tensor,
        roles: Tensor,
        positions: Tensor | None,
        cached: CachedPass | None = None,
        after_layer: Callable[[int, Tensor], Tensor] | None = None,
        opening: PlacedOpening | None = None,
    ) -> tuple[Tensor, bool]:
        """Run this stage's layers.

        Args:
            hidden: [s/(cp x tp), b, h] embeddings; None where a previous stage has set the input tensor.
            position_ids: [b, s] positions in the documents.
            roles: [b, s, 3] token roles.
            positions: [P] indexes into the flattened [b * s] tokens whose output is read; None: all of them.
            cached: a pass of the KV cache.
            after_layer: see `AttentionInputs`.
            opening: of the mask; None: it is open.

        Returns:
            [s/(cp x tp), b, h] hidden states of all tokens and false; [P/tp, 1, h] of `positions`, filled up, and true
            where the last layer has left out the others.
        """
        model = self.model_config
        angles = rotary_angles(
            position_ids, model.kv_channels, model.rotary_percent, model.rotary_base, model.rotary_scaling
        )
        rows = None
        if self.skips_outputs and positions is not None:
            num_rows, length = position_ids.shape
            multiple = self.tp_group.size() if self.config.sequence_parallel else 1
            rows = rows_to_keep(positions, length, num_rows, multiple)
        has_plain_layers = rows is None or len(self.decoder.layers) > 1
        inputs = self.attention.prepare(
            roles, rows=rows, has_plain_layers=has_plain_layers, cached=cached, opening=opening
        )
        inputs = replace(inputs, after_layer=after_layer)
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=angles, attention_bias=inputs)
        return hidden, rows is not None

    def _aligning(self, batch: Batch, alignment: Alignment, students: Batch | None) -> LayerAlignment | StateRecorder:
        """What is done behind each layer of a micro-batch (a collective of the context ranks)."""
        share, taught, shift = self._token_share(), alignment.taught, alignment.rule.shift
        if students is not None:
            assert taught is not None, "the states of a teacher need a place"
            taught.pairs = find_pairs(batch, students, share, shift)
            return StateRecorder(alignment, taught.pairs, share)
        pairs = find_pairs(batch, batch, share, shift) if taught is None else taught.pairs
        assert pairs is not None, "the second model teaches before"
        return LayerAlignment(alignment, pairs, share)

    def _teach(self, hidden: Tensor, batch: Batch, students: Batch, rule: DistillRule | None) -> Teacher:
        """What teaches the targets of some rows: states of the clean tokens before them (a collective).

        Args:
            hidden: [s/(cp x tp), b, h] final states of all tokens.
            batch: the rows that they are of.
            students: the rows with the targets, in the same slots.
            rule: of the distillation.
        """
        assert rule is not None, "a teacher is asked by a rule"
        share = self._token_share()
        index, is_known = find_before_targets(share, batch, students, rule.shift)
        states = share.gather(hidden).flatten(0, 1).index_select(0, index)
        return Teacher(states, is_known, self._head_weight().detach())

    def _token_share(self) -> TokenShare:
        is_shared = self.config.sequence_parallel
        return TokenShare(
            tensor=self.tp_group if is_shared else None,
            context=self.attention.context,
            is_counting=is_shared or self.tp_group.rank() == 0,
        )

    def _select(self, hidden: Tensor, positions: Tensor, is_kept: bool) -> Tensor:
        """[P, h] hidden states of flat positions in [b * s], whose gradient is summed over the tensor ranks.

        Args:
            hidden: [s/tp, b, h] of all tokens, or of those that the last layer has kept.
            positions: [P] flat positions.
            is_kept: whether it has kept these alone.
        """
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        length, num_rows, _ = hidden.shape
        if is_kept:
            chosen = hidden[: len(positions), 0]  # the last layer has kept them, in order
        else:
            chosen = hidden.flatten(0, 1).index_select(0, flat_rows(positions, length, num_rows))
        if self.config.sequence_parallel:
            return chosen  # the gather's backward pass reduces and scatters
        return tensor_parallel.copy_to_tensor_model_parallel_region(chosen, group=self.tp_group)

    def _head_weight(self) -> Tensor:
        if self.share_embeddings_and_output_weights and self.pre_process:
            return self.embedding.word_embeddings.weight
        return weight_of(self.output_layer)
