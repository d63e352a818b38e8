//! A writer of GGUF files, well-formed or not.

use super::{CHATML, EOS, encode, values, vocabulary};
use crate::model::{Architecture, DecoderConfig, RopeScaling};
use crate::weights::{Format, TensorRole, gguf as names};

/// The parts of a file. Everything can be changed before it is turned into bytes.
#[derive(Clone, Debug)]
pub struct GgufFile {
    pub version: u32,
    pub metadata: Vec<(String, Meta)>,
    pub tensors: Vec<GgufTensor>,
    pub alignment: usize,
}

/// A tensor as it is written.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    pub name: String,
    /// Row length first.
    pub dims: Vec<u64>,
    /// The id of its ggml type.
    pub kind: u32,
    pub bytes: Vec<u8>,
    /// In place of the offset that the writer would give.
    pub offset: Option<u64>,
}

/// A metadata value.
#[derive(Clone, Debug)]
pub enum Meta {
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Text(String),
    U64(u64),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    /// A type id and the bytes of a value, unchecked.
    Raw(u32, Vec<u8>),
}

impl GgufFile {
    /// The bytes of the file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut out, key);
            value.write(&mut out);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(offset as u64).to_le_bytes());
            offset = (offset + tensor.bytes.len()).next_multiple_of(self.alignment);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&tensor.bytes);
        }
        out
    }

    /// Replaces a value, or adds it.
    pub fn set(&mut self, key: &str, value: Meta) {
        match self.metadata.iter_mut().find(|(known, _)| known == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key.to_owned(), value)),
        }
    }

    /// Removes a value.
    pub fn unset(&mut self, key: &str) {
        self.metadata.retain(|(known, _)| known != key);
    }

    /// A tensor by name.
    pub fn tensor(&mut self, name: &str) -> &mut GgufTensor {
        let tensor = self.tensors.iter_mut().find(|tensor| tensor.name == name);
        tensor.unwrap_or_else(|| panic!("there is no tensor {name}"))
    }
}

impl Meta {
    fn write(&self, out: &mut Vec<u8>) {
        let mut kind = |id: u32| out.extend(id.to_le_bytes());
        match self {
            Meta::U32(_) => kind(4),
            Meta::I32(_) => kind(5),
            Meta::F32(_) => kind(6),
            Meta::Bool(_) => kind(7),
            Meta::Text(_) => kind(8),
            Meta::U64(_) => kind(10),
            Meta::Texts(_) => [9, 8].into_iter().for_each(kind),
            Meta::I32s(_) => [9, 5].into_iter().for_each(kind),
            Meta::F32s(_) => [9, 6].into_iter().for_each(kind),
            Meta::Raw(id, _) => kind(*id),
        }
        match self {
            Meta::U32(n) => out.extend(n.to_le_bytes()),
            Meta::I32(n) => out.extend(n.to_le_bytes()),
            Meta::F32(n) => out.extend(n.to_le_bytes()),
            Meta::Bool(b) => out.push(u8::from(*b)),
            Meta::Text(s) => text(out, s),
            Meta::U64(n) => out.extend(n.to_le_bytes()),
            Meta::Texts(all) => {
                out.extend((all.len() as u64).to_le_bytes());
                all.iter().for_each(|s| text(out, s));
            }
            Meta::I32s(all) => {
                out.extend((all.len() as u64).to_le_bytes());
                all.iter().for_each(|n| out.extend(n.to_le_bytes()));
            }
            Meta::F32s(all) => {
                out.extend((all.len() as u64).to_le_bytes());
                all.iter().for_each(|n| out.extend(n.to_le_bytes()));
            }
            Meta::Raw(_, bytes) => out.extend(bytes),
        }
    }
}

/// A model with random weights, its matrices in `format` and its vectors in F32.
///
/// A Mistral is written as a llama, as converters do; so it comes back with the architecture
/// `Llama`.
pub fn gguf(config: &DecoderConfig, format: Format, seed: u64) -> GgufFile {
    let mut file =
        GgufFile { version: 3, metadata: metadata(config), tensors: Vec::new(), alignment: 32 };
    if let Some(factors) = rope_factors(config) {
        let bytes = encode(Format::F32, factors.len(), &factors);
        file.tensors.push(tensor(
            "rope_freqs.weight".to_owned(),
            &[factors.len()],
            Format::F32,
            bytes,
        ));
    }
    for role in TensorRole::all(config) {
        let (rows, cols) = role.shape(config);
        let mut values = values(config, role, seed);
        interleave(config, role, &mut values);
        let format = match role.is_matrix() {
            true => format,
            false => Format::F32,
        };
        let bytes = encode(format, cols, &values);
        match names::stacked(role) {
            Some((name, 0)) => {
                let experts = config.moe.as_ref().map_or(0, |moe| moe.experts);
                file.tensors.push(tensor(name, &[cols, rows, experts], format, bytes));
            }
            Some((name, _)) => file.tensor(&name).bytes.extend(bytes),
            None if rows == 1 => {
                file.tensors.push(tensor(names::name(role), &[cols], format, bytes))
            }
            None => file.tensors.push(tensor(names::name(role), &[cols, rows], format, bytes)),
        }
    }
    file
}

fn tensor(name: String, dims: &[usize], format: Format, bytes: Vec<u8>) -> GgufTensor {
    let dims = dims.iter().map(|dim| *dim as u64).collect();
    GgufTensor { name, dims, kind: format.ggml(), bytes, offset: None }
}

fn is_llama(config: &DecoderConfig) -> bool {
    use Architecture::*;
    matches!(config.architecture, Llama | Mistral | Mixtral)
}

/// Puts the rows of q and k into the order of a GGUF llama, where the two elements that turn
/// together are neighbours.
fn interleave(config: &DecoderConfig, role: TensorRole, values: &mut [f32]) {
    use TensorRole::*;
    if !is_llama(config) || !matches!(role, Q(_) | K(_) | QBias(_) | KBias(_)) {
        return;
    }
    let (rows, cols) = match role {
        QBias(_) | KBias(_) => (values.len(), 1),
        _ => role.shape(config),
    };
    let (head, old) = (config.head_dim, values.to_vec());
    for row in 0..rows {
        let (start, within) = (row / head * head, row % head);
        let from = start + within % 2 * (head / 2) + within / 2;
        values[row * cols..][..cols].copy_from_slice(&old[from * cols..][..cols]);
    }
}

/// Llama 3's scaling is written as a tensor of divisors.
fn rope_factors(config: &DecoderConfig) -> Option<Vec<f32>> {
    if !matches!(config.rope.scaling, RopeScaling::Llama3 { .. }) {
        return config.rope.factors.clone();
    }
    let mut plain = config.rope.clone();
    plain.scaling = RopeScaling::None;
    let scaled = config.rope.inv_freq();
    Some(plain.inv_freq().iter().zip(&scaled).map(|(plain, scaled)| plain / scaled).collect())
}

fn metadata(config: &DecoderConfig) -> Vec<(String, Meta)> {
    let name = match is_llama(config) {
        true => "llama",
        false => config.architecture.name(),
    };
    let mut all = vec![
        ("general.architecture".to_owned(), Meta::Text(name.to_owned())),
        ("general.name".to_owned(), Meta::Text(format!("tiny {name}"))),
    ];
    let mut put = |key: &str, value: Meta| all.push((format!("{name}.{key}"), value));
    let size = |n: usize| Meta::U32(n as u32);
    put("block_count", size(config.layers));
    put("context_length", size(config.context));
    put("embedding_length", size(config.hidden));
    put("feed_forward_length", size(config.intermediate));
    put("attention.head_count", size(config.heads));
    put("attention.head_count_kv", size(config.kv_heads));
    put("attention.key_length", size(config.head_dim));
    put("attention.value_length", size(config.head_dim));
    put("attention.layer_norm_rms_epsilon", Meta::F32(config.rms_eps));
    put("rope.dimension_count", size(config.rope.dims));
    put("rope.freq_base", Meta::F32(config.rope.theta as f32));
    put("vocab_size", size(config.vocab));
    if let Some(window) = &config.sliding_window {
        put("attention.sliding_window", size(window.tokens));
    }
    if let Some(moe) = &config.moe {
        put("expert_count", size(moe.experts));
        put("expert_used_count", size(moe.experts_per_token));
        put("expert_feed_forward_length", size(moe.intermediate));
    }
    match &config.rope.scaling {
        RopeScaling::None | RopeScaling::Llama3 { .. } => {}
        RopeScaling::Linear { factor } => {
            put("rope.scaling.type", Meta::Text("linear".to_owned()));
            put("rope.scaling.factor", Meta::F32(*factor as f32));
        }
        RopeScaling::Yarn { factor, original_context, .. } => {
            put("rope.scaling.type", Meta::Text("yarn".to_owned()));
            put("rope.scaling.factor", Meta::F32(*factor as f32));
            put("rope.scaling.original_context_length", size(*original_context));
        }
    }
    all.extend(tokenizer());
    all
}

fn tokenizer() -> Vec<(String, Meta)> {
    let text = |s: &str| Meta::Text(s.to_owned());
    let entries = [
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("default")),
        ("tokenizer.ggml.tokens", Meta::Texts(vocabulary::tokens())),
        ("tokenizer.ggml.token_type", Meta::I32s(vocabulary::kinds())),
        ("tokenizer.ggml.merges", Meta::Texts(vocabulary::merges())),
        ("tokenizer.ggml.bos_token_id", Meta::U32(super::BOS)),
        ("tokenizer.ggml.eos_token_id", Meta::U32(EOS)),
        ("tokenizer.ggml.add_bos_token", Meta::Bool(false)),
        ("tokenizer.chat_template", text(CHATML)),
    ];
    entries.map(|(key, value)| (key.to_owned(), value)).to_vec()
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
