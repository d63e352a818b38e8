//! Matrix products: every kernel against the scalar twin and against plain arithmetic.

use kernels::float::{f32_to_bf16, f32_to_f16};
use kernels::format::{Format, dequantize};
use kernels::isa::Isa;
use kernels::linear::{Activations, Matrix, PackError, matmul, matmul_many};
use kernels::pool::ThreadPool;

/// Reproducible noise: xorshift64*.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Uniform in -1..1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// A binary16 between 2^-8 and 2^-6 in magnitude, of either sign.
    fn scale(&mut self) -> [u8; 2] {
        let bits = 0x1c00 + (self.next() % 0x800) as u16;
        (bits | (self.next() as u16 & 0x8000)).to_le_bytes()
    }

    /// Valid random weights: any codes, scales of an ordinary size.
    fn weights(&mut self, format: Format, elements: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..elements / format.block_len() {
            match format {
                Format::F32 => bytes.extend(self.unit().to_le_bytes()),
                Format::F16 => bytes.extend(self.scale()),
                Format::BF16 => bytes.extend(&self.unit().to_le_bytes()[2..]),
                _ => {
                    let at = bytes.len();
                    bytes.extend((0..format.block_bytes()).map(|_| self.next() as u8));
                    for offset in half_offsets(format) {
                        bytes[at + offset..][..2].copy_from_slice(&self.scale());
                    }
                }
            }
        }
        bytes
    }

    fn inputs(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.unit() * 3.0).collect()
    }
}

/// Where a block has its binary16 scales.
fn half_offsets(format: Format) -> &'static [usize] {
    match format {
        Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => &[0, 2],
        Format::Q2_K => &[80, 82],
        Format::Q3_K => &[108],
        Format::Q6_K => &[208],
        _ => &[0],
    }
}

fn product(
    isa: Isa,
    pool: &ThreadPool,
    format: Format,
    shape: (usize, usize),
    weights: &[u8],
    inputs: &[f32],
) -> Vec<f32> {
    let (rows, cols) = shape;
    let matrix = Matrix::pack(isa, pool, format, rows, cols, weights).expect("valid weights");
    multiply(pool, &matrix, inputs)
}

fn multiply(pool: &ThreadPool, matrix: &Matrix, inputs: &[f32]) -> Vec<f32> {
    let mut x = Activations::new();
    let tokens = inputs.len().checked_div(matrix.cols()).unwrap_or(0);
    x.resize(tokens, matrix.cols()).copy_from_slice(inputs);
    let mut out = vec![f32::NAN; tokens * matrix.rows()];
    matmul(pool, matrix, &mut x, &mut out);
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn columns(format: Format) -> Vec<usize> {
    match format.block_len() {
        1 if cfg!(miri) => vec![5],
        32 if cfg!(miri) => vec![32],
        _ if cfg!(miri) => vec![256],
        1 => vec![1, 3, 37, 160],
        32 => vec![32, 96, 288],
        _ => vec![256, 768],
    }
}

/// Miri gets few rows: more than a panel of them, but for the formats of long blocks.
fn miri_rows(format: Format) -> usize {
    if format.block_len() == 256 { 2 } else { 33 }
}

#[test]
fn products_are_close_to_plain_arithmetic() {
    let pool = ThreadPool::new(2);
    for format in Format::ALL {
        let mut noise = Noise(77);
        for cols in columns(format) {
            let (rows, tokens) = if cfg!(miri) { (miri_rows(format), 1) } else { (45, 3) };
            let weights = noise.weights(format, rows * cols);
            let inputs = noise.inputs(tokens * cols);
            let mut plain = vec![0.0; rows * cols];
            dequantize(format, &weights, &mut plain).expect("valid weights");
            let out = product(Isa::detect(), &pool, format, (rows, cols), &weights, &inputs);
            for (i, out) in out.iter().enumerate() {
                let w = &plain[i % rows * cols..][..cols];
                let x = &inputs[i / rows * cols..][..cols];
                let terms = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                let (sum, size) = terms.fold((0.0, 0.0), |(s, a), t| (s + t, a + t.abs()));
                let bound = match format {
                    Format::F32 | Format::F16 => 1e-6,
                    // Inputs are rounded to eight bits.
                    Format::BF16 => 1.0 / 256.0,
                    _ => 0.006,
                };
                let bound = bound * size + 1e-9;
                let off = (f64::from(*out) - sum).abs();
                assert!(off <= bound, "{format} cols {cols} at {i}: {out} for {sum}");
            }
        }
    }
}

#[test]
fn every_isa_gives_the_bits_of_the_scalar_kernel() {
    let pool = ThreadPool::new(2);
    for format in Format::ALL {
        let mut noise = Noise(5);
        for cols in columns(format) {
            let rows = match cfg!(miri) {
                true => vec![miri_rows(format)],
                false => vec![1, 15, 16, 31, 33, 64, 70],
            };
            for rows in rows {
                let weights = noise.weights(format, rows * cols);
                let inputs = noise.inputs(9 * cols);
                for tokens in [0, 1, if cfg!(miri) { 5 } else { 9 }] {
                    let inputs = &inputs[..tokens * cols];
                    let run = |isa| product(isa, &pool, format, (rows, cols), &weights, inputs);
                    let expect = bits(&run(Isa::Scalar));
                    for isa in Isa::available() {
                        let what = format!("{format} {isa} {rows}x{cols} tokens {tokens}");
                        assert!(bits(&run(isa)) == expect, "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_in_every_company() {
    for format in Format::ALL {
        let mut noise = Noise(99);
        let rows = if cfg!(miri) { miri_rows(format) } else { 83 };
        let cols = columns(format)[2.min(columns(format).len() - 1)];
        let weights = noise.weights(format, rows * cols);
        let most = if cfg!(miri) { 5 } else { 33 };
        let inputs = noise.inputs(most * cols);
        for isa in Isa::available() {
            let one = ThreadPool::new(1);
            let matrix = Matrix::pack(isa, &one, format, rows, cols, &weights).expect("valid");
            let alone: Vec<f32> =
                inputs.chunks(cols).flat_map(|x| multiply(&one, &matrix, x)).collect();
            for threads in if cfg!(miri) { 2..=2 } else { 1..=3 } {
                let pool = ThreadPool::new(threads);
                let fewer = if cfg!(miri) { 2..=2 } else { 1..=16 };
                for tokens in fewer.chain([most]) {
                    let first = most - tokens;
                    let out = multiply(&pool, &matrix, &inputs[first * cols..]);
                    let same = bits(&out) == bits(&alone[first * rows..]);
                    assert!(same, "{format} {isa} {threads} threads, {tokens} tokens");
                }
            }
            let reversed: Vec<f32> = inputs.chunks(cols).rev().flatten().copied().collect();
            let out = multiply(&one, &matrix, &reversed);
            for (out, alone) in out.chunks(rows).rev().zip(alone.chunks(rows)) {
                assert_eq!(bits(out), bits(alone), "{format} {isa} reversed");
            }
        }
    }
}

/// With many columns a call takes some of its tokens at a time.
#[test]
fn a_long_call_gives_what_its_tokens_give_alone() {
    let (rows, cols, tokens) = if cfg!(miri) { (2, 256, 2) } else { (33, 24_576, 100) };
    let pool = ThreadPool::new(2);
    for format in [Format::Q8_0, Format::Q4_K, Format::F16, Format::BF16] {
        let mut noise = Noise(31);
        let weights = noise.weights(format, rows * cols);
        let inputs = noise.inputs(tokens * cols);
        for isa in Isa::available().filter(|isa| cfg!(miri) || *isa > Isa::Scalar) {
            let matrix = Matrix::pack(isa, &pool, format, rows, cols, &weights).expect("valid");
            let together = multiply(&pool, &matrix, &inputs);
            for token in [0, 1, 47, 48, 95, 96, 99].into_iter().filter(|&token| token < tokens) {
                let alone = multiply(&pool, &matrix, &inputs[token * cols..][..cols]);
                let same = bits(&together[token * rows..][..rows]) == bits(&alone);
                assert!(same, "{format} {isa} token {token}");
            }
        }
    }
}

#[test]
fn extreme_weights_and_inputs_agree_on_every_isa() {
    let pool = ThreadPool::new(2);
    let halves: [u16; 7] = [0, 0x8000, 1, 0x8001, 0x03ff, 0x7bff, 0xfbff];
    let inputs = |cols: usize| -> Vec<f32> {
        let specials = [0.0, -0.0, 1e-40, -1e-31, 3e38, -3e38, 1.0, 127.5, -0.5, 1e-6];
        (0..5 * cols)
            .map(|i| match i / cols {
                0 => 0.0,
                1 => specials[i % specials.len()],
                2 => 1e-38,
                3 => [1.0, -1.0][i % 2],
                _ => (i % 255) as f32 - 127.0,
            })
            .collect()
    };
    for format in Format::ALL.into_iter().filter(|f| f.is_quantized()) {
        let (rows, cols) = (if cfg!(miri) { 3 } else { 40 }, 256);
        let fills = [0xff, 0x80, 0x00, 0x7f, 0x0f, 0xf0];
        for (n, fill) in fills.into_iter().enumerate().take(if cfg!(miri) { 1 } else { 6 }) {
            let mut weights = vec![fill; format.bytes_for(rows * cols).expect("whole blocks")];
            for (b, block) in weights.chunks_mut(format.block_bytes()).enumerate() {
                for (h, &offset) in half_offsets(format).iter().enumerate() {
                    let half = halves[(b + n + 3 * h) % halves.len()];
                    block[offset..][..2].copy_from_slice(&half.to_le_bytes());
                }
            }
            let run = |isa| product(isa, &pool, format, (rows, cols), &weights, &inputs(cols));
            let expect = run(Isa::Scalar);
            for isa in Isa::available() {
                for (i, (a, b)) in run(isa).iter().zip(&expect).enumerate() {
                    let same = a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
                    assert!(same, "{format} {isa} fill {fill:#x} at {i}: {a} for {b}");
                }
            }
        }
    }
}

/// Infinities, NaNs, zeros of both signs, and numbers too small to be normal. Sums that are too small
/// for that may be zero where the CPU's instruction says so.
#[test]
fn extreme_floats_agree_on_every_isa() {
    let pool = ThreadPool::new(2);
    let specials: [f32; 12] = [
        0.0,
        -0.0,
        1e-40,
        -3e-39,
        1.2e-38,
        -2e-38,
        3.3e38,
        -3.4e38,
        f32::INFINITY,
        1.0,
        -1.0039062,
        f32::NAN,
    ];
    let weight = |format: Format, value: f32| match format {
        Format::F32 => value.to_le_bytes().to_vec(),
        Format::F16 => f32_to_f16(value).to_le_bytes().to_vec(),
        _ => f32_to_bf16(value).to_le_bytes().to_vec(),
    };
    let (rows, cols) = (specials.len(), specials.len());
    for format in [Format::F32, Format::F16, Format::BF16] {
        // One special weight and one special input meet at a time, at every column.
        for shift in 0..cols {
            let at = |r: usize, c: usize| if c == (r + shift) % cols { specials[r] } else { 1e-3 };
            let weights: Vec<u8> =
                (0..rows * cols).flat_map(|i| weight(format, at(i / cols, i % cols))).collect();
            let inputs: Vec<f32> = (0..7 * cols)
                .map(|i| if i % cols == shift { specials[(i / cols + shift) % cols] } else { 0.5 })
                .collect();
            let run = |isa| product(isa, &pool, format, (rows, cols), &weights, &inputs);
            let expect = run(Isa::Scalar);
            for isa in Isa::available() {
                for (i, (a, b)) in run(isa).iter().zip(&expect).enumerate() {
                    let same = a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
                    assert!(same, "{format} {isa} shift {shift} at {i}: {a} for {b}");
                }
            }
        }
    }
    let tiny = [f32_to_bf16(1e-20).to_le_bytes(); 64].concat();
    for isa in Isa::available() {
        let out = product(isa, &pool, Format::BF16, (2, 32), &tiny, &[1e-20; 32]);
        assert!(out.iter().all(|out| out.abs() < 1e-37), "{isa} {out:?}");
    }
}

#[test]
fn an_input_that_is_not_finite_shows_in_every_output() {
    let pool = ThreadPool::new(1);
    let mut noise = Noise(3);
    let rows = if cfg!(miri) { 17 } else { 40 };
    let weights = noise.weights(Format::Q8_0, rows * 64);
    for isa in Isa::available() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut inputs = noise.inputs(3 * 64);
            inputs[64 + 40] = bad;
            let out = product(isa, &pool, Format::Q8_0, (rows, 64), &weights, &inputs);
            for (i, out) in out.iter().enumerate() {
                assert_eq!(out.is_nan(), i / rows == 1, "{isa} {bad} at {i}");
            }
        }
    }
}

#[test]
fn several_matrices_at_once_give_what_each_gives_alone() {
    let pool = ThreadPool::new(3);
    let mut noise = Noise(21);
    let cols = 256;
    let sizes = if cfg!(miri) { [17, 3, 5] } else { [70, 3, 129] };
    for isa in Isa::available() {
        let shapes = [(Format::Q4_K, sizes[0]), (Format::BF16, sizes[1]), (Format::Q8_0, sizes[2])];
        let matrices = shapes.map(|(format, rows)| {
            let weights = noise.weights(format, rows * cols);
            Matrix::pack(isa, &pool, format, rows, cols, &weights).expect("valid weights")
        });
        for tokens in [1, 5, 40].into_iter().filter(|&tokens| !cfg!(miri) || tokens < 40) {
            let inputs = noise.inputs(tokens * cols);
            let mut x = Activations::new();
            x.resize(tokens, cols).copy_from_slice(&inputs);
            let mut outs = sizes.map(|rows| vec![f32::NAN; rows * tokens]);
            let [a, b, c] = &mut outs;
            matmul_many(&pool, &matrices.each_ref(), &mut x, &mut [a, b, c]);
            for (matrix, out) in matrices.iter().zip(&outs) {
                assert_eq!(bits(out), bits(&multiply(&pool, matrix, &inputs)), "{matrix:?}");
            }
        }
    }
}

#[test]
fn inputs_can_be_reused_with_other_values_and_shapes() {
    let pool = ThreadPool::new(2);
    let mut noise = Noise(8);
    let (rows, cols) = if cfg!(miri) { (17, 64) } else { (64, 96) };
    let weights = noise.weights(Format::Q4_0, rows * cols);
    let matrix =
        Matrix::pack(Isa::detect(), &pool, Format::Q4_0, rows, cols, &weights).expect("valid");
    let mut x = Activations::new();
    for tokens in [4, 1, 7, 2] {
        let inputs = noise.inputs(tokens * cols);
        x.resize(tokens, cols).copy_from_slice(&inputs);
        let mut out = vec![f32::NAN; tokens * rows];
        matmul(&pool, &matrix, &mut x, &mut out);
        assert_eq!(bits(&out), bits(&multiply(&pool, &matrix, &inputs)));
    }
}

#[test]
fn packed_weights_take_about_as_much_memory_as_the_file() {
    let pool = ThreadPool::new(1);
    for format in Format::ALL {
        let (rows, cols) = if cfg!(miri) { (32, 256) } else { (64, 512) };
        let bytes = vec![0; format.bytes_for(rows * cols).expect("whole blocks")];
        let matrix = Matrix::pack(Isa::detect(), &pool, format, rows, cols, &bytes).expect("valid");
        let ratio = matrix.packed_bytes() as f64 / bytes.len() as f64;
        let bound = match format {
            Format::Q2_K => 1.96,
            Format::Q3_K => 1.34,
            _ => 1.03,
        };
        assert!((0.99..bound).contains(&ratio), "{format}: {ratio}");
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let pool = ThreadPool::new(1);
    let pack = |format, rows, cols, bytes: usize| {
        Matrix::pack(Isa::Scalar, &pool, format, rows, cols, &vec![0; bytes]).err()
    };
    let columns = PackError::Columns { format: Format::Q4_K, cols: 128 };
    assert_eq!(pack(Format::Q4_K, 1, 128, 72), Some(columns));
    let length = PackError::Length { format: Format::Q8_0, rows: 2, cols: 32, need: 68, bytes: 67 };
    assert_eq!(pack(Format::Q8_0, 2, 32, 67), Some(length));
    let (rows, cols) = (usize::MAX / 2, 32);
    assert_eq!(pack(Format::Q8_0, rows, cols, 0), Some(PackError::TooLarge { rows, cols }));
    assert_eq!(pack(Format::F32, 0, 5, 0), None);
    assert_eq!(pack(Format::F32, 5, 0, 0), None);
}
