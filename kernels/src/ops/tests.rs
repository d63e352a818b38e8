use super::*;

/// Numbers in [-1, 1) that look random.
fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Miri is some thousand times slower than the CPU: it gets the small shapes.
fn small(&(rows, dim): &(usize, usize)) -> bool {
    !cfg!(miri) || rows * dim <= 200
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

fn assert_close(got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(g) - w).abs() <= tolerance * w.abs().max(1.0), "[{i}] {g} for {w}");
    }
}

/// Runs `operation` on every instruction set and with several pools, asks for equal bits, and
/// returns them.
fn same_everywhere(operation: impl Fn(&ThreadPool, Isa) -> Vec<f32>) -> Vec<f32> {
    let want = operation(&ThreadPool::new(1), Isa::Scalar);
    for threads in [1, 3] {
        let pool = ThreadPool::new(threads);
        for isa in Isa::available() {
            assert_eq!(bits(&operation(&pool, isa)), bits(&want), "{isa}, {threads} threads");
        }
    }
    want
}

fn exact_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
    let mut out = Vec::new();
    for row in x.chunks_exact(weight.len()) {
        let squares: f64 = row.iter().map(|&v| f64::from(v).powi(2)).sum();
        let scale = 1.0 / (squares / row.len() as f64 + f64::from(eps)).sqrt();
        out.extend(row.iter().zip(weight).map(|(&v, &w)| f64::from(v) * scale * f64::from(w)));
    }
    out
}

#[test]
fn norms_against_f64() {
    let shapes = [(1, 1), (3, 2), (5, 16), (2, 100), (70, 896), (9, 2049)];
    for (rows, dim) in shapes.into_iter().filter(small) {
        let x = numbers(rows * dim, 1);
        let weight = numbers(dim, 2);
        let got = same_everywhere(|pool, isa| {
            let mut out = vec![0.0; x.len()];
            rms_norm(pool, isa, &x, &weight, 1e-6, &mut out);
            let mut in_place = x.clone();
            rms_norm_in_place(pool, isa, &mut in_place, &weight, 1e-6);
            assert_eq!(bits(&out), bits(&in_place));
            out
        });
        assert_close(&got, &exact_norm(&x, &weight, 1e-6), 1e-5);
    }
}

#[test]
fn the_fused_norm_is_the_sum_and_the_norm() {
    for (rows, dim) in [(1, 30), (33, 512)].into_iter().filter(small) {
        let (x, delta, weight) = (numbers(rows * dim, 3), numbers(rows * dim, 4), numbers(dim, 5));
        same_everywhere(|pool, isa| {
            let (mut sum, mut out) = (x.clone(), vec![0.0; x.len()]);
            add_rms_norm(pool, isa, &mut sum, &delta, &weight, 1e-5, &mut out);
            let (mut apart, mut normed) = (x.clone(), vec![0.0; x.len()]);
            add(pool, isa, &mut apart, &delta);
            rms_norm(pool, isa, &apart, &weight, 1e-5, &mut normed);
            assert_eq!((bits(&sum), bits(&out)), (bits(&apart), bits(&normed)));
            out
        });
    }
}

#[test]
fn bias_and_activation_against_f64() {
    for (rows, dim) in [(1, 3), (4, 16), (100, 250)].into_iter().filter(small) {
        let (x, bias) = (numbers(rows * dim, 6), numbers(dim, 7));
        let got = same_everywhere(|pool, isa| {
            let mut out = x.clone();
            add_bias(pool, isa, &mut out, &bias);
            out
        });
        let want = x.iter().enumerate().map(|(i, v)| f64::from(v + bias[i % dim]));
        assert_close(&got, &want.collect::<Vec<_>>(), 0.0);

        let gate: Vec<f32> = x.iter().map(|v| v * 30.0).collect();
        let up = numbers(rows * dim, 8);
        let got = same_everywhere(|pool, isa| {
            let mut out = gate.clone();
            silu_mul(pool, isa, &mut out, &up);
            out
        });
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let want = gate.iter().zip(&up).map(|(&g, &u)| silu(f64::from(g)) * f64::from(u));
        assert_close(&got, &want.collect::<Vec<_>>(), 1e-6);
    }
}

#[test]
fn softmax_against_f64() {
    for len in [1, 15, 16, 17, if cfg!(miri) { 33 } else { 1000 }] {
        let mut x: Vec<f32> = numbers(len, 9).iter().map(|v| v * 50.0).collect();
        if len > 5 {
            x[3] = f32::NEG_INFINITY;
        }
        let got = same_everywhere(|_, isa| {
            let mut out = x.clone();
            softmax(isa, &mut out);
            out
        });
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let e: Vec<f64> = x.iter().map(|&v| (f64::from(v) - f64::from(max)).exp()).collect();
        let total: f64 = e.iter().sum();
        assert_close(&got, &e.iter().map(|v| v / total).collect::<Vec<_>>(), 1e-6);
        if len > 5 {
            assert_eq!(got[3].to_bits(), 0);
        }
    }
}

#[test]
fn argmax_table() {
    let inf = f32::INFINITY;
    let mut long = numbers(1000, 10);
    long[777] = 5.0;
    long[900] = 5.0;
    let table: &[(&[f32], Option<usize>)] = &[
        (&[], None),
        (&[3.0], Some(0)),
        (&[1.0, 2.0, 2.0], Some(1)),
        (&[-1.0, -inf], Some(0)),
        (&[-inf, -inf], Some(0)),
        (&[f32::NAN, 1.0], Some(1)),
        (&[1.0, f32::NAN], Some(0)),
        (&[f32::NAN, f32::NAN], Some(0)),
        (&[-0.0, 0.0], Some(0)),
        (&long, Some(777)),
    ];
    for isa in Isa::available() {
        for (x, want) in table {
            assert_eq!(argmax(isa, x), *want, "{isa} {x:?}");
        }
    }
}

#[test]
fn rope_rotates_pairs_of_both_layouts() {
    let inv_freq = [1.0f32, 0.1, 0.003];
    let positions = [0u32, 5, 40_000];
    let (heads, head_dim) = (2, 8);
    for layout in [RopeLayout::Interleaved, RopeLayout::HalfSplit] {
        let x = numbers(positions.len() * heads * head_dim, 11);
        let mut table = RopeTable::new(layout, &inv_freq, 1.5);
        table.set_positions(&positions);
        let got = same_everywhere(|pool, _| {
            let mut out = x.clone();
            table.apply(pool, &mut out, heads, head_dim);
            out
        });
        let mut want: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
        for (row, &p) in want.chunks_exact_mut(heads * head_dim).zip(&positions) {
            for head in row.chunks_exact_mut(head_dim) {
                for (i, &f) in inv_freq.iter().enumerate() {
                    let (a, b) = match layout {
                        RopeLayout::Interleaved => (2 * i, 2 * i + 1),
                        RopeLayout::HalfSplit => (i, i + 3),
                    };
                    let angle = f64::from(p as f32 * f);
                    let (re, im) = (head[a], head[b]);
                    head[a] = 1.5 * (re * angle.cos() - im * angle.sin());
                    head[b] = 1.5 * (im * angle.cos() + re * angle.sin());
                }
            }
        }
        assert_close(&got, &want, 1e-6);
        // Position 0 turns nothing, and what lies behind the rotated part stays.
        assert_eq!(bits(&got[6..8]), bits(&x[6..8]));
    }
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    let (rows, dim) = if cfg!(miri) { (5, 40) } else { (64, 300) };
    let (x, weight) = (numbers(rows * dim, 12), numbers(dim, 13));
    let pool = ThreadPool::new(2);
    let isa = Isa::detect();
    let mut all = vec![0.0; x.len()];
    rms_norm(&pool, isa, &x, &weight, 1e-6, &mut all);
    for (row, want) in x.chunks_exact(dim).zip(all.chunks_exact(dim)) {
        let mut one = vec![0.0; dim];
        rms_norm(&pool, isa, row, &weight, 1e-6, &mut one);
        assert_eq!(bits(&one), bits(want));
    }
}

#[test]
#[should_panic(expected = "are not rows of 3")]
fn rows_must_fit() {
    rms_norm(&ThreadPool::new(1), Isa::Scalar, &[0.0; 4], &[0.0; 3], 1e-5, &mut [0.0; 4]);
}
