//! Formats against the `gguf` Python package: the files in `golden` come from `golden/make.py`.

use kernels::format::{Format, LengthError, dequantize};
use kernels::quant::{quantize_q4_0, quantize_q8_0};

macro_rules! golden {
    ($($format:ident)*) => {
        [$((
            Format::$format,
            include_bytes!(concat!("golden/", stringify!($format), ".bytes")).as_slice(),
            include_bytes!(concat!("golden/", stringify!($format), ".f32")).as_slice(),
        )),*]
    };
}

const GOLDEN: [(Format, &[u8], &[u8]); 15] = golden!(
    F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS
);

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[test]
fn dequantize_gives_the_bits_of_the_gguf_package() {
    for (format, bytes, expect) in GOLDEN {
        let expect = floats(expect);
        let mut out = vec![f32::NAN; expect.len()];
        dequantize(format, bytes, &mut out).expect("golden files have whole blocks");
        for (i, (out, expect)) in out.iter().zip(&expect).enumerate() {
            assert_eq!(out.to_bits(), expect.to_bits(), "{format} at {i}: {out} for {expect}");
        }
    }
}

#[test]
fn quantize_gives_the_bytes_of_the_gguf_package() {
    type Quantize = fn(&[f32], &mut [u8]) -> Result<(), LengthError>;
    let values = floats(include_bytes!("golden/floats.f32"));
    let table: [(Format, Quantize); 2] =
        [(Format::Q8_0, quantize_q8_0), (Format::Q4_0, quantize_q4_0)];
    for (format, quantize) in table {
        let (_, expect, _) = GOLDEN.iter().find(|g| g.0 == format).expect("in the table");
        let mut out = vec![0xaa; expect.len()];
        quantize(&values, &mut out).expect("the golden files have whole blocks");
        for (b, (out, expect)) in
            out.chunks(format.block_bytes()).zip(expect.chunks(format.block_bytes())).enumerate()
        {
            assert_eq!(out, expect, "{format} block {b}");
        }
    }
}

#[test]
fn ids_and_sizes_are_those_of_ggml() {
    for format in Format::ALL {
        assert_eq!(Format::from_ggml(format.ggml()), Some(format));
        assert_eq!(format.bytes_for(0), Some(0));
        assert_eq!(format.bytes_for(256), Some(256 / format.block_len() * format.block_bytes()));
    }
    for (id, expect) in [(0, Some(Format::F32)), (14, Some(Format::Q6_K)), (4, None), (99, None)] {
        assert_eq!(Format::from_ggml(id), expect);
    }
    assert_eq!(Format::Q8_0.bytes_for(33), None);
    assert_eq!(Format::F32.bytes_for(usize::MAX), None);
}

#[test]
fn lengths_that_do_not_fit_are_refused_with_the_reason() {
    let table = [
        (Format::Q8_0, 34, 31, "31 values do not fill Q8_0 blocks of 32 values"),
        (Format::Q4_K, 143, 256, "256 Q4_K values take 144 bytes, not 143"),
        (Format::F16, 3, 2, "2 F16 values take 4 bytes, not 3"),
    ];
    for (format, bytes, elements, expect) in table {
        let error = dequantize(format, &vec![0; bytes], &mut vec![0.0; elements]);
        assert_eq!(error.expect_err("does not fit").to_string(), expect);
    }
}
