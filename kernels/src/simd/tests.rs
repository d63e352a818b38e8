use super::*;
use crate::isa::Isa;

unsafe fn exp_all<L: Lanes>(values: &mut [f32]) {
    for piece in values.chunks_exact_mut(LANES) {
        // SAFETY: a piece has sixteen elements; the CPU is the caller's promise.
        unsafe { L::load(piece.as_ptr()).exp().store(piece.as_mut_ptr()) };
    }
}

fn exp(isa: Isa, values: &[f32]) -> Vec<f32> {
    let mut out = values.to_vec();
    let slice = out.as_mut_slice();
    // SAFETY: `exp_all` asks for nothing but the CPU.
    unsafe { dispatch!(isa, exp_all(slice: &mut [f32])) };
    out
}

#[test]
fn exp_is_within_two_ulp_and_equal_on_all_isas() {
    let mut values: Vec<f32> = (0..1 << 18).map(|i| -104.5 + i as f32 * 7.5e-4).collect();
    values.extend((0..1 << 14).map(|i| (i as f32 - 8192.0) * 1e-6));
    if cfg!(miri) {
        values = values.into_iter().step_by(1001).collect();
        values.truncate(values.len() / LANES * LANES);
    }
    let want = exp(Isa::Scalar, &values);
    for (&x, &y) in values.iter().zip(&want) {
        let exact = f64::from(x).exp();
        let ulp = if exact < f64::from(f32::MIN_POSITIVE) {
            2f64.powi(-149)
        } else {
            2f64.powi(exact.log2().floor() as i32 - 23)
        };
        if exact < f64::from(f32::MAX) {
            let error = (f64::from(y) - exact).abs() / ulp;
            assert!(error <= 2.0, "exp({x}) = {y}, {error} ulp");
        }
    }
    for isa in Isa::available() {
        let got = exp(isa, &values);
        let same = got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "{isa:?} differs from scalar");
    }
}

#[test]
fn exp_at_the_edges() {
    for isa in Isa::available() {
        let mut x = [0.0; LANES];
        x[..7].copy_from_slice(&[
            f32::NEG_INFINITY,
            f32::INFINITY,
            f32::NAN,
            -0.0,
            -1e30,
            1e30,
            88.8,
        ]);
        let y = exp(isa, &x);
        assert_eq!(y[0].to_bits(), 0, "{isa:?}");
        assert_eq!(y[1], f32::INFINITY);
        assert!(y[2].is_nan());
        assert_eq!(y[3], 1.0);
        assert_eq!(y[4].to_bits(), 0);
        assert_eq!(y[5], f32::INFINITY);
        assert_eq!(y[6], f32::INFINITY);
    }
}

/// Runs every operation on the same numbers and collects the bits.
unsafe fn everything<L: Lanes>(a: &[f32; LANES], b: &[f32; LANES]) -> Vec<u32> {
    let mut bits = Vec::new();
    // SAFETY: all pointers are to arrays of sixteen; the CPU is the caller's promise.
    unsafe {
        let (x, y) = (L::load(a.as_ptr()), L::load(b.as_ptr()));
        let mut results = vec![
            x.add(y),
            x.sub(y),
            x.mul(y),
            x.div(y),
            x.fma(y, x),
            x.fnma(y, x),
            x.max(y),
            x.min(y),
            x.select(y, 0xa5c3),
            L::load_part(a.as_ptr(), 5, 7.0),
        ];
        let mut rows: [L; LANES] = std::array::from_fn(|i| x.add(L::splat(i as f32)));
        L::transpose(&mut rows);
        results.extend(rows);
        for r in results {
            bits.extend(r.to_array().map(f32::to_bits));
        }
        bits.extend([x.sum().to_bits(), x.greatest().to_bits()]);
        let mut half = [0u16; LANES];
        x.store_f16(half.as_mut_ptr());
        bits.extend(half.map(u32::from));
        bits.extend(L::load_f16(half.as_ptr()).to_array().map(f32::to_bits));
        x.store_bf16(half.as_mut_ptr());
        bits.extend(half.map(u32::from));
        bits.extend(L::load_bf16(half.as_ptr()).to_array().map(f32::to_bits));
        let mut part = *b;
        x.store_part(part.as_mut_ptr(), 9);
        bits.extend(part.map(f32::to_bits));
    }
    bits
}

#[test]
fn operations_are_equal_on_all_isas() {
    let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, 1e-40, 65519.9, 65520.0, 3e38];
    for seed in 0..if cfg!(miri) { 4 } else { 64u32 } {
        let number = |i: usize, salt: u32| {
            let h = (seed * 977 + i as u32 * 131 + salt).wrapping_mul(2_654_435_761);
            if h >> 29 == 0 { special[h as usize % 8] } else { (h as f32 / 2e8 - 10.0).powi(3) }
        };
        let a: [f32; LANES] = std::array::from_fn(|i| number(i, 1));
        let b: [f32; LANES] = std::array::from_fn(|i| number(i, 7777));
        let nan_as_one = |bits: Vec<u32>| -> Vec<u32> {
            bits.into_iter().map(|b| if f32::from_bits(b).is_nan() { 1 } else { b }).collect()
        };
        // SAFETY: scalar lanes run on every CPU.
        let want = nan_as_one(unsafe { everything::<ScalarLanes>(&a, &b) });
        for isa in Isa::available() {
            let (pa, pb) = (&a, &b);
            // SAFETY: `everything` asks for nothing but the CPU.
            let got = unsafe {
                dispatch!(isa, everything(pa: &[f32; LANES], pb: &[f32; LANES]) -> Vec<u32>)
            };
            assert_eq!(nan_as_one(got), want, "{isa:?} seed {seed}");
        }
    }
}

#[test]
fn transpose_moves_columns_to_rows() {
    // SAFETY: scalar lanes run on every CPU.
    unsafe {
        let mut rows: [ScalarLanes; LANES] =
            std::array::from_fn(|i| ScalarLanes(std::array::from_fn(|j| (100 * i + j) as f32)));
        ScalarLanes::transpose(&mut rows);
        assert_eq!(rows[3].0[5], 503.0);
    }
}
