//! An opened model.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use kernels::format::Format;
use kernels::map::MappedFile;

use super::{GgufTokenizer, HfTokenizer, ModelError, Tensor, TensorRole, gguf, hf};
use crate::model::DecoderConfig;

/// A model whose description is checked and whose tensors are all in place. Opening reads no
/// weights; they are read from the mapped files when they are asked for.
#[derive(Debug)]
pub struct ModelSource {
    /// `general.name` of a GGUF, else the file's or directory's name.
    pub name: String,
    pub config: DecoderConfig,
    pub tokenizer: TokenizerSource,
    /// The default chat template, in Jinja.
    pub chat_template: Option<String>,
    /// Other templates by name, such as `tool_use`.
    pub named_templates: Vec<(String, String)>,
    /// Tokens that end an answer, the main one first; may be empty.
    pub eos_ids: Vec<u32>,
    pub(super) naming: Naming,
    pub(super) files: Vec<WeightFile>,
    pub(super) places: BTreeMap<String, Place>,
    pub(super) digest: OnceLock<[u8; 32]>,
}

/// Where the tokenizer is described.
#[derive(Clone, Debug)]
pub enum TokenizerSource {
    Gguf(Box<GgufTokenizer>),
    Hf(Box<HfTokenizer>),
}

/// Chat templates in Jinja.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Templates {
    pub default: Option<String>,
    /// Name and template.
    pub named: Vec<(String, String)>,
}

/// What the file calls the tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    Gguf,
    /// `mixtral` for Mixtral's names of router and experts.
    Hf {
        mixtral: bool,
    },
}

/// A file with tensors in it.
#[derive(Debug)]
pub(super) struct WeightFile {
    pub path: PathBuf,
    pub bytes: WeightBytes,
}

pub(super) enum WeightBytes {
    Mapped(MappedFile),
    Memory(Cow<'static, [u8]>),
}

/// A tensor's place and shape.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Index into `files`.
    pub file: usize,
    pub start: usize,
    pub len: usize,
    pub format: Format,
    /// Row length first; unused ones are 1.
    pub dims: [usize; gguf::DIMS_MAX],
}

impl ModelSource {
    /// Opens a `.gguf` file (of a split one, the first part) or a Hugging Face directory.
    ///
    /// # Errors
    /// Everything that makes the model unusable, found before any weight is read: nothing was
    /// changed, and nothing stays open.
    pub fn open(path: &Path) -> Result<ModelSource, ModelError> {
        match path.is_dir() {
            true => hf::open(path),
            false => gguf::open(WeightFile::map(path)?),
        }
    }

    /// Opens a GGUF that is part of the binary; `name` stands in for the file's name in errors.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<ModelSource, ModelError> {
        ModelSource::from_bytes(name, bytes)
    }

    /// Opens a GGUF that is already in memory.
    pub fn from_bytes(
        name: &str,
        bytes: impl Into<Cow<'static, [u8]>>,
    ) -> Result<ModelSource, ModelError> {
        gguf::open(WeightFile { path: name.into(), bytes: WeightBytes::Memory(bytes.into()) })
    }

    /// Bytes of all files with tensors in them.
    pub fn size_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes().len() as u64).sum()
    }

    /// The tensor of a role that the description has.
    ///
    /// # Errors
    /// `MissingTensor` for a role that this model does not have.
    pub fn tensor(&self, role: TensorRole) -> Result<Tensor<'_>, ModelError> {
        self.optional_tensor(role)?.ok_or_else(|| self.missing(role))
    }

    /// The tensor of a role, if the model has it. A tied `Output` is the token embedding.
    pub fn optional_tensor(&self, role: TensorRole) -> Result<Option<Tensor<'_>>, ModelError> {
        let role = match role {
            TensorRole::Output if self.config.tied_embeddings => TensorRole::TokenEmbedding,
            role => role,
        };
        let (rows, cols) = role.shape(&self.config);
        let Some((name, place, part)) = self.find(role) else { return Ok(None) };
        self.check_shape(role, &name, place)?;
        let file = &self.files[place.file];
        let Some(len) = place.format.bytes_for(cols).and_then(|row| row.checked_mul(rows)) else {
            return Err(file.refuse(&name, format!("its shape [{rows}, {cols}] is too large")));
        };
        let start = place.start + part * len;
        let Some(bytes) = file.bytes().get(start..start + len) else {
            return Err(file.refuse(&name, format!("part {part} is beyond its end")));
        };
        let format = place.format;
        Ok(Some(Tensor { name, format, rows, cols, bytes: Cow::Borrowed(bytes) }))
    }

    /// Says that the bytes of a role were copied: their pages may leave memory until they are
    /// asked for again.
    pub fn release(&self, role: TensorRole) {
        if let Some((_, place, _)) = self.find(role) {
            self.files[place.file].release(place);
        }
    }

    /// BLAKE3 over the name, format, shape and BLAKE3 of the bytes of every tensor, in the order of
    /// the names: the same weights give the same digest whatever else the file says, and any other
    /// weights another one.
    ///
    /// The first call reads every weight, with as many threads as there are cores, and may run on
    /// another thread while the model is made ready; later calls give the kept result.
    pub fn digest(&self) -> [u8; 32] {
        *self.digest.get_or_init(|| {
            let mut hasher = blake3::Hasher::new_derive_key(DIGEST_CONTEXT);
            for ((name, place), bytes) in self.places.iter().zip(self.tensor_digests()) {
                hasher.update(&(name.len() as u64).to_le_bytes());
                hasher.update(name.as_bytes());
                hasher.update(&place.format.ggml().to_le_bytes());
                for dim in place.dims {
                    hasher.update(&(dim as u64).to_le_bytes());
                }
                hasher.update(&bytes);
            }
            *hasher.finalize().as_bytes()
        })
    }

    /// The digest of each tensor's bytes, in the order of the names.
    fn tensor_digests(&self) -> Vec<[u8; 32]> {
        let places: Vec<&Place> = self.places.values().collect();
        let digests: Vec<OnceLock<[u8; 32]>> = places.iter().map(|_| OnceLock::new()).collect();
        let digest = |index: usize| {
            let Place { file, start, len, .. } = *places[index];
            let digest = blake3::hash(&self.files[file].bytes()[start..start + len]);
            self.files[file].release(places[index]);
            *digest.as_bytes()
        };
        let next = AtomicUsize::new(0);
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        std::thread::scope(|scope| {
            for _ in 0..threads.min(DIGEST_THREADS_MAX) {
                scope.spawn(|| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(slot) = digests.get(index) else { break };
                        slot.get_or_init(|| digest(index));
                    }
                });
            }
        });
        let kept = |(index, slot): (usize, &OnceLock<_>)| *slot.get_or_init(|| digest(index));
        digests.iter().enumerate().map(kept).collect()
    }

    /// The name and place of a role, and which part of a stack it is.
    fn find(&self, role: TensorRole) -> Option<(String, &Place, usize)> {
        let name = match self.naming {
            Naming::Gguf => {
                if let Some((name, part)) = gguf::stacked(role)
                    && let Some(place) = self.places.get(&name)
                {
                    return Some((name, place, part));
                }
                gguf::name(role)
            }
            Naming::Hf { mixtral } => hf::name(role, mixtral),
        };
        let place = self.places.get(&name)?;
        Some((name, place, 0))
    }

    fn check_shape(&self, role: TensorRole, name: &str, place: &Place) -> Result<(), ModelError> {
        let (rows, cols) = role.shape(&self.config);
        let stack = match (self.naming, gguf::stacked(role), &self.config.moe) {
            (Naming::Gguf, Some((stacked, _)), Some(moe)) if stacked == name => moe.experts,
            _ => 1,
        };
        let expected = [cols, rows, stack, 1];
        if place.dims == expected {
            return Ok(());
        }
        let (has, wants) = (shape(&place.dims), shape(&expected));
        let reason = format!("its shape is {has}; the description asks for {wants}");
        Err(self.files[place.file].refuse(name, reason))
    }

    /// Checks that every role is there with its shape, and that no tensor is left which this
    /// engine would have to compute with.
    pub(super) fn check(self, ignored: impl Fn(&str) -> bool) -> Result<ModelSource, ModelError> {
        let mut used = std::collections::BTreeSet::new();
        for role in TensorRole::all(&self.config) {
            let Some((name, place, _)) = self.find(role) else { return Err(self.missing(role)) };
            self.check_shape(role, &name, place)?;
            used.insert(name);
        }
        let unused = self.places.iter().find(|(name, _)| !used.contains(*name) && !ignored(name));
        if let Some((name, place)) = unused {
            let architecture = self.config.architecture;
            let reason = format!("a {architecture} model as described has no such tensor");
            return Err(self.files[place.file].refuse(name, reason));
        }
        Ok(self)
    }

    fn missing(&self, role: TensorRole) -> ModelError {
        let tensor = match self.naming {
            Naming::Gguf => gguf::stacked(role).map_or_else(|| gguf::name(role), |(name, _)| name),
            Naming::Hf { mixtral } => hf::name(role, mixtral),
        };
        let file = self.files.first().map(|file| file.path.clone()).unwrap_or_default();
        ModelError::MissingTensor { file, tensor }
    }
}

impl WeightFile {
    pub fn map(path: &Path) -> Result<WeightFile, ModelError> {
        let map = MappedFile::open(path).map_err(|error| ModelError::Unreadable {
            file: path.to_owned(),
            reason: error.to_string(),
        })?;
        Ok(WeightFile { path: path.to_owned(), bytes: WeightBytes::Mapped(map) })
    }

    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            WeightBytes::Mapped(map) => map.bytes(),
            WeightBytes::Memory(bytes) => bytes,
        }
    }

    fn release(&self, place: &Place) {
        if let WeightBytes::Mapped(map) = &self.bytes
            && place.len >= RELEASED_BYTES_MIN
        {
            map.release(place.start..place.start + place.len);
        }
    }

    fn refuse(&self, tensor: &str, reason: String) -> ModelError {
        ModelError::Tensor { file: self.path.clone(), tensor: tensor.to_owned(), reason }
    }
}

impl fmt::Debug for WeightBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, len) = match self {
            WeightBytes::Mapped(map) => ("mapped", map.bytes().len()),
            WeightBytes::Memory(bytes) => ("owned", bytes.len()),
        };
        write!(f, "{len} {kind} bytes")
    }
}

/// Rows first, without the ones that no tensor needs.
fn shape(dims: &[usize; gguf::DIMS_MAX]) -> String {
    let used = dims.iter().rposition(|dim| *dim != 1).map_or(1, |last| last + 1);
    let parts: Vec<String> = dims[..used].iter().rev().map(usize::to_string).collect();
    format!("[{}]", parts.join(", "))
}

/// Below this, memory saved is not worth the call.
const RELEASED_BYTES_MIN: usize = 1 << 16;
/// Threads that read for the digest.
const DIGEST_THREADS_MAX: usize = 16;
/// Separates this use of BLAKE3 from all others.
const DIGEST_CONTEXT: &str = "grapevine 2026-01 weights digest";
