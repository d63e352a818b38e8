//! Tensors of one or many `.safetensors` files.
//!
//! The header is read by the `safetensors` crate, which limits its length to 100 MB, proves that
//! the tensors cover the data without gap or overlap, and checks each size against its shape.

use std::collections::BTreeMap;
use std::path::Path;

use ::safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, TensorInfo};
use kernels::format::Format;
use serde_json::Value;

use super::json::Object;
use crate::weights::ModelError;
use crate::weights::gguf::DIMS_MAX;
use crate::weights::source::{Place, WeightFile};

/// The files and, by name, the tensors of a directory.
pub(super) fn read(
    directory: &Path,
) -> Result<(Vec<WeightFile>, BTreeMap<String, Place>), ModelError> {
    let mut files = Vec::new();
    let mut places = BTreeMap::new();
    for (index, shard) in shards(directory)?.into_iter().enumerate() {
        let file = WeightFile::map(&directory.join(shard))?;
        for (name, place) in tensors(index, &file)? {
            if places.insert(name.clone(), place).is_some() {
                let reason = "an earlier file has one of this name".to_owned();
                return Err(ModelError::Tensor { file: file.path.clone(), tensor: name, reason });
            }
        }
        files.push(file);
    }
    Ok((files, places))
}

/// The names of the files with weights, without any directory.
fn shards(directory: &Path) -> Result<Vec<String>, ModelError> {
    let single = "model.safetensors";
    let index = directory.join("model.safetensors.index.json");
    let Some(index) = Object::read(&index)? else {
        if directory.join(single).exists() {
            return Ok(vec![single.to_owned()]);
        }
        let reason = "it has neither model.safetensors nor model.safetensors.index.json";
        return Err(ModelError::File { file: directory.to_owned(), reason: reason.to_owned() });
    };
    let map = index.object("weight_map")?;
    let map = map.ok_or_else(|| index.missing("weight_map", "tensors and their files"))?;
    let mut shards = std::collections::BTreeSet::new();
    for (tensor, shard) in &map.map {
        let plain = shard.as_str().filter(|name| is_plain_name(name));
        let Some(name) = plain else {
            let value = super::json::shown(shard);
            return Err(map.wrong(tensor, value, "the name of a file in the same directory"));
        };
        shards.insert(name.to_owned());
    }
    if shards.len() > SHARDS_MAX || shards.is_empty() {
        let expected = format!("1 to {SHARDS_MAX} files");
        return Err(index.wrong("weight_map", format!("{} files", shards.len()), &expected));
    }
    for name in &shards {
        if !directory.join(name).exists() {
            let reason = format!("it names {name}, which is not there");
            return Err(ModelError::File { file: index.file.clone(), reason });
        }
    }
    Ok(shards.into_iter().collect())
}

/// Whether joining it to a directory stays in that directory.
fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    name.ends_with(".safetensors") && !name.starts_with('.') && name.chars().all(plain)
}

fn tensors(index: usize, file: &WeightFile) -> Result<Vec<(String, Place)>, ModelError> {
    let bytes = file.bytes();
    let refuse = |reason: String| ModelError::File { file: file.path.clone(), reason };
    let (header, metadata) = SafeTensors::read_metadata(bytes)
        .map_err(|error| header_error(&file.path, bytes, &error))?;
    let data = header + HEADER_LEN_BYTES;
    let mut tensors = Vec::new();
    for (name, info) in metadata.tensors() {
        let place = place(index, data, info).map_err(|reason| ModelError::Tensor {
            file: file.path.clone(),
            tensor: name.clone(),
            reason,
        })?;
        if place.start.checked_add(place.len).is_none_or(|end| end > bytes.len()) {
            return Err(refuse(format!("the data of tensor `{name}` is beyond its end")));
        }
        tensors.push((name, place));
    }
    Ok(tensors)
}

fn place(file: usize, data: usize, info: &TensorInfo) -> Result<Place, String> {
    let format = match info.dtype {
        Dtype::F32 => Format::F32,
        Dtype::F16 => Format::F16,
        Dtype::BF16 => Format::BF16,
        other => return Err(format!("its type is {other}; supported are F32, F16, BF16")),
    };
    let rank = info.shape.len();
    if !(1..=DIMS_MAX).contains(&rank) || info.shape.contains(&0) {
        return Err(format!("its shape is {:?}; expected 1 to {DIMS_MAX} sizes", info.shape));
    }
    let mut dims = [1; DIMS_MAX];
    for (dim, size) in dims.iter_mut().zip(info.shape.iter().rev()) {
        *dim = *size;
    }
    let (start, end) = info.data_offsets;
    Ok(Place { file, start: data + start, len: end - start, format, dims })
}

/// The crate's errors, with the name of the tensor where it leaves it out.
fn header_error(path: &Path, bytes: &[u8], error: &SafeTensorError) -> ModelError {
    let file = path.to_owned();
    match error {
        SafeTensorError::InvalidOffset(tensor) => ModelError::Tensor {
            file,
            tensor: tensor.clone(),
            reason: "its data does not follow that of the tensor before it".to_owned(),
        },
        SafeTensorError::TensorInvalidInfo => match misshapen(bytes) {
            Some((tensor, reason)) => ModelError::Tensor { file, tensor, reason },
            None => ModelError::File { file, reason: error.to_string() },
        },
        SafeTensorError::MetadataIncompleteBuffer => {
            let reason = "the data is not as long as the header says: the file is truncated or \
                          damaged";
            ModelError::File { file, reason: reason.to_owned() }
        }
        other => ModelError::File { file, reason: format!("the safetensors header: {other}") },
    }
}

/// The first tensor whose shape, type and place disagree, in a header that is valid JSON.
fn misshapen(bytes: &[u8]) -> Option<(String, String)> {
    let (len, rest) = bytes.split_first_chunk::<HEADER_LEN_BYTES>()?;
    let header = rest.get(..usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(header).ok()?;
    header.into_iter().find_map(|(name, value)| {
        let info: TensorInfo = serde_json::from_value(value).ok()?;
        let elements = info.shape.iter().try_fold(1usize, |all, size| all.checked_mul(*size))?;
        let needs = elements.checked_mul(info.dtype.bitsize())? / 8;
        let has = info.data_offsets.1.checked_sub(info.data_offsets.0)?;
        let (shape, dtype) = (&info.shape, info.dtype);
        let reason = format!("{shape:?} of {dtype} takes {needs} bytes; its offsets say {has}");
        (needs != has).then_some((name, reason))
    })
}

const HEADER_LEN_BYTES: usize = 8;
/// Files of one model.
const SHARDS_MAX: usize = 1024;
