//! Mutated files: whatever a file says, opening it ends with a model or with a sentence.
//!
//! The mutations know the structure, so that most of them get past the first check; the same run
//! gives the same files. Without room for it, a believed hostile count would end the process.

use serde_json::{Value, json};

use crate::weights::testing::{self, GgufFile, HfFiles, Meta, Random};
use crate::weights::{Format, ModelSource};

fn interesting(random: &mut Random) -> u64 {
    let all = [0, 1, 2, 3, 7, 31, 32, 33, 255, 256, 65_535, 1 << 20, 1 << 31, 1 << 32, 1 << 61];
    match random.below(4) {
        0 => random.next(),
        1 => u64::MAX - random.below(40) as u64,
        _ => all[random.below(all.len())],
    }
}

fn mutate_structure(file: &mut GgufFile, random: &mut Random) {
    let entry = random.below(file.metadata.len());
    let tensor = random.below(file.tensors.len());
    let number = interesting(random);
    match random.below(12) {
        0 => file.metadata[entry].1 = Meta::U64(number),
        1 => file.metadata[entry].1 = Meta::U32(number as u32),
        2 => file.metadata[entry].1 = Meta::I32(number as i32),
        3 => file.metadata[entry].1 = Meta::F32(f32::from_bits(number as u32)),
        4 => {
            file.metadata.remove(entry);
        }
        5 => {
            // An array that promises more than there is.
            let mut bytes = (random.below(14) as u32).to_le_bytes().to_vec();
            bytes.extend(number.to_le_bytes());
            file.metadata[entry].1 = Meta::Raw(9, bytes);
        }
        6 => file.set("general.alignment", Meta::U32(number as u32)),
        7 => {
            let dims = &mut file.tensors[tensor].dims;
            let at = random.below(dims.len());
            dims[at] = number;
        }
        8 => file.tensors[tensor].kind = random.below(44) as u32,
        9 => file.tensors[tensor].offset = Some(number),
        10 => file.tensors[tensor].dims.push(number),
        _ => {
            file.tensors.remove(tensor);
        }
    }
}

fn mutate_bytes(bytes: &mut Vec<u8>, random: &mut Random) {
    // Most of the file is data that no one checks: stay in its head.
    let head = bytes.len().min(if random.below(4) == 0 { 64 } else { 16 << 10 });
    if head == 0 {
        return;
    }
    let at = random.below(head);
    match random.below(5) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes.truncate(at),
        2 => {
            let number = interesting(random).to_le_bytes();
            let room = bytes.len().min(at + number.len()) - at;
            bytes[at..at + room].copy_from_slice(&number[..room]);
        }
        3 => {
            let insert = vec![random.next() as u8; random.below(32)];
            bytes.splice(at..at, insert);
        }
        _ => {
            let end = bytes.len().min(at + random.below(64));
            bytes.drain(at..end);
        }
    }
}

#[test]
fn mutated_ggufs_are_refused_or_work() {
    for (seed, architecture) in testing::ARCHITECTURES.into_iter().enumerate() {
        let whole = testing::gguf(&testing::smallest(architecture), Format::F32, 1);
        let mut random = Random::new(seed as u64);
        let mut opened = 0;
        for _ in 0..1200 {
            let mut file = whole.clone();
            for _ in 0..random.below(3) {
                mutate_structure(&mut file, &mut random);
            }
            let mut bytes = file.bytes();
            for _ in 0..random.below(3) {
                mutate_bytes(&mut bytes, &mut random);
            }
            opened += usize::from(testing::exercise(ModelSource::from_bytes("mutated", bytes)));
        }
        // Both sides of the border are reached.
        assert!((100..1100).contains(&opened), "{architecture}: {opened} opened");
    }
}

fn mutate_config(files: &mut HfFiles, random: &mut Random) {
    let number = interesting(random);
    let value = match random.below(8) {
        0 => json!(number),
        1 => json!(-(random.below(100) as i64)),
        2 => json!(f64::from_bits(number)),
        3 => Value::Null,
        4 => json!([number, "x"]),
        5 => json!({ "rope_type": "yarn", "factor": number }),
        6 => json!("sliding_attention"),
        _ => json!(random.below(300)),
    };
    let map = files.config.as_object_mut().expect("an object");
    let extra = ["rope_parameters", "layer_types", "partial_rotary_factor", "use_sliding_window"];
    let known: Vec<String> = map.keys().cloned().chain(extra.map(str::to_owned)).collect();
    map.insert(known[random.below(known.len())].clone(), value);
}

#[test]
fn mutated_directories_are_refused_or_work() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    for (seed, architecture) in testing::ARCHITECTURES.into_iter().enumerate() {
        let whole = testing::hf(&testing::smallest(architecture), Format::BF16, 1);
        whole.write(path, 1).expect("written");
        let mut random = Random::new(seed as u64);
        let mut opened = 0;
        for _ in 0..200 {
            let mut files = whole.clone();
            for _ in 0..random.below(3) {
                mutate_config(&mut files, &mut random);
            }
            let mut weights = files.shard(0, 1);
            if random.below(3) == 0 {
                mutate_bytes(&mut weights, &mut random);
            }
            let mut config = files.config.to_string().into_bytes();
            if random.below(4) == 0 {
                mutate_bytes(&mut config, &mut random);
            }
            std::fs::write(path.join("config.json"), config).expect("written");
            std::fs::write(path.join("model.safetensors"), weights).expect("written");
            opened += usize::from(testing::exercise(ModelSource::open(path)));
        }
        assert!((20..190).contains(&opened), "{architecture}: {opened} opened");
    }
}
