//! From a GGUF file, or the parts of a split one, to an opened model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{Gguf, TensorInfo, Value};
use crate::weights::source::{Naming, Place, WeightBytes, WeightFile};
use crate::weights::{ModelError, ModelSource, TokenizerSource};

/// Opens the model whose (first) file this is.
pub(in crate::weights) fn open(first: WeightFile) -> Result<ModelSource, ModelError> {
    let path = first.path.clone();
    let parts = part_paths(&first)?;
    let mut files = vec![first];
    for part in parts {
        files.push(WeightFile::map(&part)?);
    }
    let mut places = BTreeMap::new();
    for (index, file) in files.iter().enumerate() {
        let gguf = Gguf::parse(&file.path, file.bytes())?;
        for tensor in &gguf.tensors {
            if places.insert(tensor.name.to_owned(), place(index, tensor)).is_some() {
                let reason = "an earlier part has one of this name".to_owned();
                return Err(refuse(&file.path, tensor.name, reason));
            }
        }
    }
    let gguf = Gguf::parse(&path, files[0].bytes())?;
    let factors = rope_factors(&files, &places)?;
    let config = super::decoder_config(&gguf, factors, &|name| places.contains_key(name))?;
    let tokenizer = super::tokenizer::read(&gguf)?;
    let templates = super::chat_templates(&gguf)?;
    let name = gguf.optional("general.name", "a text", Value::text)?.filter(|n| !n.is_empty());
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let source = ModelSource {
        name: name.map(str::to_owned).or(stem).unwrap_or_default(),
        config,
        eos_ids: super::eos_ids(&tokenizer),
        tokenizer: TokenizerSource::Gguf(Box::new(tokenizer)),
        chat_template: templates.default,
        named_templates: templates.named,
        naming: Naming::Gguf,
        files,
        places,
        digest: Default::default(),
    };
    source.check(|name| name == ROPE_FREQS)
}

fn place(file: usize, tensor: &TensorInfo<'_>) -> Place {
    let TensorInfo { start, len, format, dims, .. } = *tensor;
    Place { file, start, len, format, dims }
}

/// The other parts, if the file is the first of several.
fn part_paths(first: &WeightFile) -> Result<Vec<PathBuf>, ModelError> {
    let gguf = Gguf::parse(&first.path, first.bytes())?;
    let count = gguf.optional("split.count", "a whole number", Value::size)?.unwrap_or(1);
    if count <= 1 {
        return Ok(Vec::new());
    }
    if count > PARTS_MAX {
        let expected = format!("at most {PARTS_MAX} parts");
        return Err(gguf.wrong("split.count", count.to_string(), &expected));
    }
    let number = gguf.optional("split.no", "a whole number", Value::size)?.unwrap_or(0);
    if number != 0 {
        let expected = "0: open the first part of a split model";
        return Err(gguf.wrong("split.no", number.to_string(), expected));
    }
    let name = first.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let suffix = format!("-00001-of-{count:05}.gguf");
    let (Some(stem), WeightBytes::Mapped(_)) = (name.strip_suffix(&suffix), &first.bytes) else {
        let expected = format!("1, or a file whose name ends with {suffix}");
        return Err(gguf.wrong("split.count", count.to_string(), &expected));
    };
    let path =
        |part: usize| first.path.with_file_name(format!("{stem}-{part:05}-of-{count:05}.gguf"));
    Ok((2..=count).map(path).collect())
}

/// The numbers of `rope_freqs.weight`.
fn rope_factors(
    files: &[WeightFile],
    places: &BTreeMap<String, Place>,
) -> Result<Option<Vec<f32>>, ModelError> {
    let Some(place) = places.get(ROPE_FREQS) else { return Ok(None) };
    let file = &files[place.file];
    let count = place.dims.iter().product::<usize>();
    if place.format.is_quantized() || count > crate::model::HEAD_DIM_MAX {
        let reason = format!("it is {count} {} values; expected a few floats", place.format);
        return Err(refuse(&file.path, ROPE_FREQS, reason));
    }
    let mut factors = vec![0.0; count];
    let bytes = &file.bytes()[place.start..place.start + place.len];
    kernels::format::dequantize(place.format, bytes, &mut factors)
        .map_err(|error| refuse(&file.path, ROPE_FREQS, error.to_string()))?;
    Ok(Some(factors))
}

fn refuse(file: &Path, tensor: &str, reason: String) -> ModelError {
    ModelError::Tensor { file: file.to_owned(), tensor: tensor.to_owned(), reason }
}

const ROPE_FREQS: &str = "rope_freqs.weight";
/// Files of one split model.
const PARTS_MAX: usize = 1024;
