//! A model specification on the command line, to a replica in memory.

use super::args::{EngineArgs, IsaName, KvType, QuantType};
use anyhow::{Context, bail};
use cache::{IdentityParts, NumericalIdentity};
use engine::chat::ChatTemplate;
use engine::executor::{Executor, ExecutorOptions, KvCapacity, KvDtype, KvLayout};
use engine::model::{Decoder, LoadOptions, Quant};
use engine::replica::Replica;
use engine::tiers::{DiskOptions, TiersOptions};
use engine::tokenizer::Tokenizer;
use engine::weights::ModelSource;
use kernels::isa::Isa;
use scheduler::BatcherConfig;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// What `--model` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSpec {
    /// The name that clients ask for.
    pub name: String,
    pub place: ModelPlace,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelPlace {
    /// The model that is built in.
    Demo,
    Path(PathBuf),
}

/// A model's files, opened and checked; no weight has been read.
pub struct OpenModel {
    pub source: ModelSource,
    pub tokenizer: Tokenizer,
    pub template: ChatTemplate,
}

/// A model in memory.
pub struct LoadedModel {
    pub replica: Replica,
    pub template: ChatTemplate,
    pub hidden: usize,
    /// Names weights and numerics in answers.
    pub fingerprint: String,
}

impl ModelSpec {
    /// `demo`, a path, or `name=` one of these. The default name is the file's, without `.gguf`.
    pub fn parse(spec: &str) -> anyhow::Result<Self> {
        let (name, place) = match spec.split_once('=') {
            Some((name, place)) if !name.contains('/') => (Some(name), place),
            _ => (None, spec),
        };
        if name == Some("") || place.is_empty() {
            bail!(
                "{spec:?} is not a model: give FILE.gguf, a directory, `demo`, or NAME=one of these"
            );
        }
        if place == "demo" {
            return Ok(ModelSpec {
                name: name.unwrap_or("demo").to_owned(),
                place: ModelPlace::Demo,
            });
        }
        let path = Path::new(place);
        let stem = match path.extension() {
            Some(extension) if extension == "gguf" => path.file_stem(),
            _ => path.file_name(),
        };
        let name = match (name, stem) {
            (Some(name), _) => name.to_owned(),
            (None, Some(stem)) => stem.to_string_lossy().into_owned(),
            (None, None) => bail!("{spec:?} has no name of its own: say NAME={spec}"),
        };
        Ok(ModelSpec { name, place: ModelPlace::Path(path.to_owned()) })
    }

    /// Opens the files and builds tokenizer and template.
    pub fn open(&self) -> anyhow::Result<OpenModel> {
        let source = match &self.place {
            ModelPlace::Demo => ModelSource::from_static("demo.gguf", DEMO)?,
            ModelPlace::Path(path) => ModelSource::open(path)?,
        };
        let tokenizer = Tokenizer::new(&source.tokenizer)
            .with_context(|| format!("{}: the tokenizer cannot be used", self.name))?;
        let template = match &source.chat_template {
            Some(template) => ChatTemplate::new(template)
                .with_context(|| format!("{}: the chat template cannot be used", self.name))?,
            None => ChatTemplate::chatml(),
        };
        Ok(OpenModel { source, tokenizer, template })
    }
}

/// Loads the weights and starts the replica's threads. `progress` gets the share that is done.
pub fn load(
    model: OpenModel,
    args: &EngineArgs,
    secret: [u8; 32],
    progress: &mut dyn FnMut(f32),
) -> anyhow::Result<LoadedModel> {
    let OpenModel { source, tokenizer, template } = model;
    let (executor, context) = executor(source, args, Sizing::default(), progress)?;
    let digest = executor.identity().digest();
    // The executor's digest covers weights, architecture, KV type and rope; adapters come later.
    let parts = IdentityParts {
        weights: &digest,
        architecture: executor.decoder().config().architecture.name(),
        kv_dtype: "",
        rope: "",
        adapter: "",
    };
    let identity = NumericalIdentity::new(&parts);
    let blocks =
        u32::try_from(executor.block_capacity()).context("more KV blocks than can be numbered")?;
    let mut config = BatcherConfig::new(blocks, context, identity);
    if let Some(tokens) = args.step_tokens {
        config.tokens_per_step_max = tokens;
        config.sequences_max = config.sequences_max.min(tokens);
    }
    let step_time_ms = args.step_time_ms.unwrap_or(STEP_TIME_MS);
    config.step_time_target = (step_time_ms > 0).then(|| Duration::from_millis(step_time_ms));
    let hidden = executor.decoder().config().hidden;
    let fingerprint: String = digest[..8].iter().map(|b| format!("{b:02x}")).collect();
    let replica = Replica::new(executor, tokenizer, config, secret)?;
    Ok(LoadedModel { replica, template, hidden, fingerprint: format!("fp_{fingerprint}") })
}

/// What lies below the KV cache of the model that is served under this name.
pub fn tiers(name: &str, served: &super::up::Served) -> TiersOptions {
    let disk = served.data.as_ref().filter(|_| served.kv_disk_bytes > 0);
    TiersOptions {
        host_bytes: served.kv_host_bytes,
        disk: disk.map(|data| DiskOptions {
            folder: data.join("kv").join(folder_name(name)),
            bytes: served.kv_disk_bytes as u64,
        }),
    }
}

/// One folder for each name, whatever is in it.
fn folder_name(name: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let mut folder = String::new();
    for (at, byte) in name.bytes().enumerate() {
        match is_plain(byte) && !(at == 0 && byte == b'.') {
            true => folder.push(char::from(byte)),
            false => folder.push_str(&format!("%{byte:02X}")),
        }
    }
    folder
}

/// What those who drive an executor themselves know about their needs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sizing {
    /// KV blocks, instead of what the arguments say of memory.
    pub kv_blocks: Option<usize>,
    /// Measure where the time of a step goes.
    pub profile: bool,
}

/// An executor for the model, and its context.
pub fn executor(
    source: ModelSource,
    args: &EngineArgs,
    sizing: Sizing,
    progress: &mut dyn FnMut(f32),
) -> anyhow::Result<(Executor, usize)> {
    let threads = args.threads.unwrap_or_else(default_threads);
    if threads == 0 || threads > THREADS_MAX {
        bail!("--threads {threads}: give a number from 1 to {THREADS_MAX}");
    }
    let trained = source.config.context;
    let context = args.context.unwrap_or(trained);
    if context < 2 || context > trained {
        bail!("--context {context}: this model was trained for 2 to {trained} tokens");
    }
    let mut report = |p: engine::model::LoadProgress| {
        progress(p.bytes_done as f32 / p.bytes_total.max(1) as f32);
    };
    let options = LoadOptions {
        isa: args.isa.map_or_else(Isa::detect, isa),
        threads,
        quant: args.quant.map(|q| match q {
            QuantType::Q8_0 => Quant::Q8_0,
            QuantType::Q4_0 => Quant::Q4_0,
        }),
        progress: &mut report,
    };
    let decoder = Decoder::load(Arc::new(source), options)?;
    let kv_dtype = match args.kv_dtype {
        None | Some(KvType::F16) => KvDtype::F16,
        Some(KvType::Bf16) => KvDtype::Bf16,
        Some(KvType::F32) => KvDtype::F32,
    };
    let layout = KvLayout {
        layers: decoder.config().layers,
        kv_heads: decoder.config().kv_heads,
        head_dim: decoder.config().head_dim,
        block_tokens: cache::BLOCK_TOKENS_DEFAULT,
        dtype: kv_dtype,
    };
    let kv_capacity = match sizing.kv_blocks {
        Some(blocks) => KvCapacity::Blocks(blocks),
        None => KvCapacity::Bytes(kv_bytes(args, layout.block_bytes(), context)?),
    };
    let defaults = ExecutorOptions::default();
    let options = ExecutorOptions {
        kv_dtype,
        kv_capacity,
        profile: sizing.profile,
        threads,
        tokens_per_pass: args.step_tokens.unwrap_or(defaults.tokens_per_pass),
        ..defaults
    };
    Ok((Executor::new(decoder, &options)?, context))
}

/// What was asked for, or room for [`KV_SEQUENCES`] full contexts within a quarter of free memory.
fn kv_bytes(args: &EngineArgs, block_bytes: usize, context: usize) -> anyhow::Result<usize> {
    if let Some(size) = &args.kv_memory {
        let bytes = parse_size(size)?;
        if bytes < block_bytes {
            bail!("--kv-memory {size}: one block of this model's cache takes {block_bytes} bytes");
        }
        return Ok(bytes);
    }
    let blocks = context.div_ceil(cache::BLOCK_TOKENS_DEFAULT).saturating_mul(KV_SEQUENCES);
    let free = super::system::available_memory_bytes().unwrap_or(KV_BYTES_WITHOUT_KNOWLEDGE * 4);
    Ok(blocks.saturating_mul(block_bytes).min(free / 4).max(block_bytes * 4))
}

/// `512MiB`, `4GiB`, `2g`, `1000000`: binary units, whatever their spelling.
pub fn parse_size(text: &str) -> anyhow::Result<usize> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text[digits.len()..].to_ascii_lowercase();
    let shift = match unit.as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => bail!("{text:?} is not a size: say 512MiB or 4GiB"),
    };
    let number: f64 = digits
        .trim()
        .parse()
        .ok()
        .filter(|n: &f64| n.is_finite() && *n >= 0.0)
        .with_context(|| format!("{text:?} is not a size: say 512MiB or 4GiB"))?;
    Ok((number * (1u64 << shift) as f64) as usize)
}

/// One thread for each physical core: two on one core share its arithmetic units.
pub fn default_threads() -> usize {
    super::system::physical_cores().clamp(1, THREADS_MAX)
}

pub fn isa(name: IsaName) -> Isa {
    match name {
        IsaName::Scalar => Isa::Scalar,
        IsaName::Avx2 => Isa::Avx2,
        IsaName::Avx512 => Isa::Avx512,
        IsaName::Avx512Bf16 => Isa::Avx512Bf16,
        IsaName::Neon => Isa::Neon,
        IsaName::NeonDot => Isa::NeonDot,
        IsaName::NeonI8mm => Isa::NeonI8mm,
    }
}

/// The built-in model; see docs/demo-model/.
static DEMO: &[u8] = include_bytes!("../../assets/demo.gguf");
/// Full contexts that the default KV memory has room for.
const KV_SEQUENCES: usize = 16;
/// Streams go on faster than anybody reads. What is read of a prompt beside them may be little: the step
/// reads the weights for the streams anyway.
const STEP_TIME_MS: u64 = 50;
const KV_BYTES_WITHOUT_KNOWLEDGE: usize = 1 << 30;
const THREADS_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders() {
        for (name, folder) in [
            ("qwen2.5-0.5b_q8", "qwen2.5-0.5b_q8"),
            ("org/model", "org%2Fmodel"),
            ("..", "%2E."),
            ("a%b", "a%25b"),
            ("é", "%C3%A9"),
        ] {
            assert_eq!(folder_name(name), folder);
        }
    }

    #[test]
    fn specs() {
        for (spec, name, path) in [
            ("demo", "demo", None),
            ("tiny=demo", "tiny", None),
            ("/models/qwen-q8_0.gguf", "qwen-q8_0", Some("/models/qwen-q8_0.gguf")),
            ("hf/Llama-3.2-1B", "Llama-3.2-1B", Some("hf/Llama-3.2-1B")),
            ("chat=/m/x.gguf", "chat", Some("/m/x.gguf")),
            ("/odd=dir/x.gguf", "x", Some("/odd=dir/x.gguf")),
        ] {
            let parsed = ModelSpec::parse(spec).expect(spec);
            assert_eq!(parsed.name, name);
            let expected = path.map_or(ModelPlace::Demo, |p| ModelPlace::Path(p.into()));
            assert_eq!(parsed.place, expected);
        }
        for bad in ["", "=x", "x=", ".."] {
            assert!(ModelSpec::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("0", 0), ("1000", 1000), ("512MiB", 512 << 20), ("1.5g", 3 << 29), ("2KB", 2048)]
        {
            assert_eq!(parse_size(text).expect(text), bytes);
        }
        for bad in ["", "GiB", "-1", "4 parsecs", "1e999", "nan"] {
            assert!(parse_size(bad).is_err(), "{bad:?}");
        }
    }
}
