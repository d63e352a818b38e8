//! The GGUF container, versions 2 and 3, little endian.
//!
//! Owns the layout: header, metadata, tensor infos, data. Everything is borrowed from the file's
//! bytes, so that a hostile count cannot make it allocate: a number is believed only after the
//! bytes it promises have been seen. The layout is specified in ggml's `docs/gguf.md`.

mod config;
mod cursor;
mod names;
mod open;
mod tokenizer;
mod value;

use std::collections::BTreeMap;
use std::path::Path;

use kernels::format::Format;

use super::ModelError;
use config::decoder_config;
use cursor::Cursor;
pub(super) use names::{name, stacked};
pub(super) use open::open;
pub use tokenizer::GgufTokenizer;
use tokenizer::{chat_templates, eos_ids};
use value::{Array, Value};

/// A parsed file: what it says of itself and where its tensors lie.
#[derive(Debug)]
pub(super) struct Gguf<'a> {
    pub file: &'a Path,
    pub metadata: BTreeMap<&'a str, Value<'a>>,
    /// In the order of the file.
    pub tensors: Vec<TensorInfo<'a>>,
}

/// A tensor's shape and place.
#[derive(Clone, Copy, Debug)]
pub(super) struct TensorInfo<'a> {
    pub name: &'a str,
    pub format: Format,
    /// Fastest first, as in the file; unused ones are 1.
    pub dims: [usize; DIMS_MAX],
    /// From the start of the file.
    pub start: usize,
    pub len: usize,
}

impl<'a> Gguf<'a> {
    /// Reads everything but the tensors' data, and checks that the data is there.
    pub fn parse(file: &'a Path, bytes: &'a [u8]) -> Result<Gguf<'a>, ModelError> {
        let mut cursor = Cursor::new(file, bytes);
        let (tensor_count, metadata_count) = header(&mut cursor)?;
        let metadata = metadata(&mut cursor, metadata_count)?;
        let alignment = alignment(file, &metadata)?;
        let mut tensors = tensor_infos(&mut cursor, tensor_count)?;
        let data = cursor.at().next_multiple_of(alignment);
        for tensor in &mut tensors {
            place(file, bytes.len(), data, alignment, tensor)?;
        }
        refuse_overlaps(file, &tensors)?;
        Ok(Gguf { file, metadata, tensors })
    }

    /// A value that may be missing, of any type that `read` takes.
    pub fn optional<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.wrong(key, value.to_string(), expected))
    }

    /// A value that must be there.
    pub fn required<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&Value<'a>) -> Option<T>,
    ) -> Result<T, ModelError> {
        self.optional(key, expected, read)?.ok_or_else(|| ModelError::MissingKey {
            file: self.file.to_owned(),
            key: key.to_owned(),
            expected: expected.to_owned(),
        })
    }

    pub fn wrong(&self, key: &str, value: String, expected: &str) -> ModelError {
        ModelError::Config {
            file: self.file.to_owned(),
            key: key.to_owned(),
            value,
            expected: expected.to_owned(),
        }
    }
}

fn header(cursor: &mut Cursor<'_>) -> Result<(u64, u64), ModelError> {
    let magic = cursor.array::<4>("the magic number")?;
    if magic != *b"GGUF" {
        let hex = u32::from_be_bytes(magic);
        return Err(cursor.refuse(format!(
            "not a GGUF file: it begins with {hex:#010x} (of a Hugging Face model, give the directory)"
        )));
    }
    let version = cursor.u32("the version")?;
    if version.swap_bytes() == 2 || version.swap_bytes() == 3 {
        return Err(cursor.refuse("a big-endian GGUF file; convert it to little endian"));
    }
    if !matches!(version, 2 | 3) {
        let sentence = format!("GGUF version {version} is not supported; supported are 2 and 3");
        return Err(cursor.refuse(sentence));
    }
    let tensors = cursor.u64("the number of tensors")?;
    let metadata = cursor.u64("the number of metadata entries")?;
    for (count, what, max) in
        [(tensors, "tensors", TENSORS_MAX), (metadata, "metadata entries", METADATA_MAX)]
    {
        if count > max {
            return Err(
                cursor.refuse(format!("it promises {count} {what}; at most {max} are read"))
            );
        }
    }
    Ok((tensors, metadata))
}

fn metadata<'a>(
    cursor: &mut Cursor<'a>,
    count: u64,
) -> Result<BTreeMap<&'a str, Value<'a>>, ModelError> {
    let mut metadata = BTreeMap::new();
    for index in 0..count {
        let key = cursor.name(&format_args!("the key of metadata entry {index}"), KEY_BYTES_MAX)?;
        let value = value::read(cursor, key)?;
        if metadata.insert(key, value).is_some() {
            return Err(cursor.refuse(format!("metadata key `{key}` is there twice")));
        }
    }
    Ok(metadata)
}

fn alignment(file: &Path, metadata: &BTreeMap<&str, Value<'_>>) -> Result<usize, ModelError> {
    let key = "general.alignment";
    let Some(value) = metadata.get(key) else { return Ok(ALIGNMENT_DEFAULT) };
    let valid = |n: &usize| n.is_power_of_two() && *n <= ALIGNMENT_MAX;
    value.size().filter(valid).ok_or_else(|| ModelError::Config {
        file: file.to_owned(),
        key: key.to_owned(),
        value: value.to_string(),
        expected: format!("a power of two up to {ALIGNMENT_MAX}"),
    })
}

fn tensor_infos<'a>(
    cursor: &mut Cursor<'a>,
    count: u64,
) -> Result<Vec<TensorInfo<'a>>, ModelError> {
    let mut tensors = Vec::new();
    let mut names = std::collections::BTreeSet::new();
    for index in 0..count {
        let name = cursor.name(&format_args!("the name of tensor {index}"), NAME_BYTES_MAX)?;
        let tensor = tensor_info(cursor, name)?;
        if !names.insert(name) {
            return Err(cursor.refuse_tensor(name, "there are two of this name"));
        }
        tensors.push(tensor);
    }
    Ok(tensors)
}

/// One info, whose `start` is still relative to the data.
fn tensor_info<'a>(cursor: &mut Cursor<'a>, name: &'a str) -> Result<TensorInfo<'a>, ModelError> {
    let what = format_args!("the description of tensor `{name}`");
    let count = cursor.u32(what)? as usize;
    if !(1..=DIMS_MAX).contains(&count) {
        let reason = format!("it has {count} dimensions; expected 1 to {DIMS_MAX}");
        return Err(cursor.refuse_tensor(name, reason));
    }
    let mut dims = [1; DIMS_MAX];
    for dim in &mut dims[..count] {
        *dim = usize::try_from(cursor.u64(what)?).unwrap_or(usize::MAX);
    }
    let id = cursor.u32(what)?;
    let Some(format) = Format::from_ggml(id) else {
        let name_of = ggml_name(id).unwrap_or("unknown");
        let known = Format::ALL.map(Format::name).join(", ");
        let reason = format!("its type is {name_of} ({id}); supported are {known}");
        return Err(cursor.refuse_tensor(name, reason));
    };
    let start = usize::try_from(cursor.u64(what)?).unwrap_or(usize::MAX);
    if dims.contains(&0) {
        let shape = &dims[..count];
        return Err(cursor.refuse_tensor(name, format!("its shape {shape:?} has a zero")));
    }
    if !dims[0].is_multiple_of(format.block_len()) {
        let (row, block) = (dims[0], format.block_len());
        let reason = format!("its rows of {row} values do not fill {format} blocks of {block}");
        return Err(cursor.refuse_tensor(name, reason));
    }
    let elements = dims.iter().try_fold(1usize, |all, dim| all.checked_mul(*dim));
    let Some(len) = elements.and_then(|elements| format.bytes_for(elements)) else {
        let shape = &dims[..count];
        return Err(cursor.refuse_tensor(name, format!("its shape {shape:?} is too large")));
    };
    Ok(TensorInfo { name, format, dims, start, len })
}

/// Turns a tensor's offset into a place in the file.
fn place(
    file: &Path,
    file_len: usize,
    data: usize,
    alignment: usize,
    tensor: &mut TensorInfo<'_>,
) -> Result<(), ModelError> {
    let refuse = |reason: String| ModelError::Tensor {
        file: file.to_owned(),
        tensor: tensor.name.to_owned(),
        reason,
    };
    let (offset, len) = (tensor.start, tensor.len);
    if !offset.is_multiple_of(alignment) {
        return Err(refuse(format!("its offset {offset} is not a multiple of {alignment}")));
    }
    let end = data.checked_add(offset).and_then(|start| start.checked_add(len));
    match end {
        Some(end) if end <= file_len => tensor.start = data + offset,
        _ => {
            let has = file_len.saturating_sub(data);
            return Err(refuse(format!(
                "its {len} bytes at offset {offset} reach beyond the {has} bytes of data: \
                 the file is truncated or damaged"
            )));
        }
    }
    Ok(())
}

fn refuse_overlaps(file: &Path, tensors: &[TensorInfo<'_>]) -> Result<(), ModelError> {
    let mut by_place: Vec<&TensorInfo<'_>> = tensors.iter().collect();
    by_place.sort_by_key(|tensor| tensor.start);
    for pair in by_place.windows(2) {
        if pair[0].start + pair[0].len > pair[1].start {
            return Err(ModelError::Tensor {
                file: file.to_owned(),
                tensor: pair[1].name.to_owned(),
                reason: format!("its data overlaps that of `{}`", pair[0].name),
            });
        }
    }
    Ok(())
}

/// Names of ggml types that are not read, so that the refusal can say them.
fn ggml_name(id: u32) -> Option<&'static str> {
    UNSUPPORTED.iter().find(|(known, _)| *known == id).map(|(_, name)| *name)
}

/// Dimensions of a tensor.
pub(super) const DIMS_MAX: usize = 4;
/// Tensors in one file.
const TENSORS_MAX: u64 = 1 << 20;
/// Metadata entries in one file.
const METADATA_MAX: u64 = 1 << 16;
/// The container's own limit on the length of a key.
const KEY_BYTES_MAX: usize = 65_535;
/// Four times ggml's limit on the length of a tensor's name.
const NAME_BYTES_MAX: usize = 256;
const ALIGNMENT_DEFAULT: usize = 32;
const ALIGNMENT_MAX: usize = 1 << 20;
const UNSUPPORTED: [(u32, &str); 20] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (31, "Q4_0_4_4"),
    (41, "Q1_0"),
];
