use super::*;

fn rope(theta: f64, dims: usize, scaling: RopeScaling) -> Rope {
    Rope { theta, dims, layout: RopeLayout::Half, scaling, factors: None }
}

/// What `transformers` 5.23 computes in float32: the length, the factor on sine and cosine, some
/// frequencies by index, and their sum.
struct Expected {
    mscale: f64,
    freqs: [(usize, f64); 8],
    sum: f64,
}

#[test]
fn frequencies_are_those_of_transformers() {
    let llama3 = |factor| RopeScaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192,
    };
    let table = [
        (
            rope(10_000.0, 64, RopeScaling::None),
            Expected {
                mscale: 1.0,
                freqs: [
                    (0, 1.0),
                    (1, 0.7498942017555237),
                    (8, 0.10000000149011612),
                    (13, 0.0237137358635664),
                    (16, 0.009999999776482582),
                    (20, 0.003162277862429619),
                    (24, 0.0010000000474974513),
                    (31, 0.0001333521504420787),
                ],
                sum: 3.997908228135202,
            },
        ),
        (
            rope(10_000.0, 64, RopeScaling::Linear { factor: 4.0 }),
            Expected {
                mscale: 1.0,
                freqs: [
                    (0, 0.25),
                    (1, 0.18747355043888092),
                    (8, 0.02500000037252903),
                    (13, 0.0059284339658916),
                    (16, 0.0024999999441206455),
                    (20, 0.0007905694656074047),
                    (24, 0.0002500000118743628),
                    (31, 3.333803761051968e-05),
                ],
                sum: 0.9994770570338005,
            },
        ),
        (
            rope(500_000.0, 64, llama3(32.0)),
            Expected {
                mscale: 1.0,
                freqs: [
                    (0, 1.0),
                    (1, 0.663601279258728),
                    (8, 0.03760603070259094),
                    (13, 0.00483942124992609),
                    (16, 0.000429556705057621),
                    (20, 8.570255886297673e-06),
                    (24, 1.6619674170215148e-06),
                    (31, 9.418306490260875e-08),
                ],
                sum: 2.9682023966443296,
            },
        ),
        (
            rope(500_000.0, 128, llama3(8.0)),
            Expected {
                mscale: 1.0,
                freqs: [
                    (0, 1.0),
                    (1, 0.8146172165870667),
                    (16, 0.03760603070259094),
                    (29, 0.0021665706299245358),
                    (32, 0.0005248460220173001),
                    (40, 3.428102354519069e-05),
                    (48, 6.647869668086059e-06),
                    (63, 3.068925877869333e-07),
                ],
                sum: 5.386058263449144,
            },
        ),
    ];
    for (rope, expected) in table {
        check(&rope, &expected);
    }
}

#[test]
fn yarn_is_that_of_transformers() {
    let yarn = |factor, original_context| RopeScaling::Yarn {
        factor,
        original_context,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
        mscale: None,
        mscale_all_dim: None,
        truncate: true,
    };
    let first = rope(1_000_000.0, 128, yarn(4.0, 32_768));
    check(
        &first,
        &Expected {
            mscale: 1.138629436111989,
            freqs: [
                (0, 1.0),
                (1, 0.8058422207832336),
                (16, 0.03162277862429619),
                (29, 0.0014051124453544617),
                (32, 0.0006029411451891065),
                (40, 4.4456985051510856e-05),
                (48, 7.905693564680405e-06),
                (63, 3.102344408034696e-07),
            ],
            sum: 5.1440348281193735,
        },
    );
    let mut second = rope(10_000.0, 64, yarn(16.0, 4096));
    if let RopeScaling::Yarn { beta_fast, beta_slow, mscale, mscale_all_dim, .. } =
        &mut second.scaling
    {
        (*beta_fast, *beta_slow) = (24.0, 2.0);
        (*mscale, *mscale_all_dim) = (Some(0.8), Some(0.4));
    }
    check(
        &second,
        &Expected {
            mscale: 1.0998318431878675,
            freqs: [
                (0, 1.0),
                (1, 0.7498942017555237),
                (8, 0.10000000149011612),
                (13, 0.019267410039901733),
                (16, 0.0053125000558793545),
                (20, 0.0004941059742122889),
                (24, 6.25000029685907e-05),
                (31, 8.33450940262992e-06),
            ],
            sum: 3.9535541851983,
        },
    );
    let mut third = rope(10_000.0, 64, yarn(16.0, 4096));
    if let RopeScaling::Yarn { attention_factor, truncate, .. } = &mut third.scaling {
        (*attention_factor, *truncate) = (Some(1.25), false);
    }
    check(
        &third,
        &Expected {
            mscale: 1.25,
            freqs: [
                (0, 1.0),
                (1, 0.7498942017555237),
                (8, 0.10000000149011612),
                (13, 0.019046740606427193),
                (16, 0.0056962138041853905),
                (20, 0.0008164704777300358),
                (24, 6.25000029685907e-05),
                (31, 8.33450940262992e-06),
            ],
            sum: 3.9534417210124957,
        },
    );
}

/// Within two units of the last place of f32: torch's own power is not exact to the last one.
fn check(rope: &Rope, expected: &Expected) {
    let freqs = rope.inv_freq();
    assert_eq!(freqs.len(), rope.dims / 2);
    for (i, freq) in expected.freqs {
        let off = f64::from(freqs[i]) / freq - 1.0;
        assert!(off.abs() < 2.4e-7, "{:?} at {i}: {} {freq}", rope.scaling, freqs[i]);
    }
    let sum: f64 = freqs.iter().map(|freq| f64::from(*freq)).sum();
    assert!((sum / expected.sum - 1.0).abs() < 1e-7, "{:?}: {sum}", rope.scaling);
    assert!((f64::from(rope.mscale()) / expected.mscale - 1.0).abs() < 1e-7);
}

#[test]
fn yarn_reaches_beyond_the_original_context() {
    let yarn = RopeScaling::Yarn {
        factor: 4.0,
        original_context: 32_768,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
        mscale: None,
        mscale_all_dim: None,
        truncate: true,
    };
    let yarn = rope(1_000_000.0, 128, yarn);
    assert_eq!(
        (yarn.reach(32_768), yarn.reach(131_072), yarn.reach(200_000)),
        (131_072, 131_072, 200_000)
    );
    assert_eq!(rope(10_000.0, 64, RopeScaling::Linear { factor: 4.0 }).reach(4096), 4096);
}

#[test]
fn the_divisors_of_a_gguf_are_llama3_scaling() {
    let mut plain = rope(500_000.0, 8, RopeScaling::None);
    plain.factors = Some(vec![1.0, 2.0, 8.0, 32.0]);
    let unscaled = rope(500_000.0, 8, RopeScaling::None).inv_freq();
    let expected = [unscaled[0], unscaled[1] / 2.0, unscaled[2] / 8.0, unscaled[3] / 32.0];
    assert_eq!(plain.inv_freq(), expected);
}

#[test]
fn numbers_out_of_range_are_refused() {
    type Change = fn(&mut DecoderConfig);
    let table: [(Change, Field); 14] = [
        (|c| c.layers = 0, Field::Layers),
        (|c| c.layers = LAYERS_MAX + 1, Field::Layers),
        (|c| c.hidden = usize::MAX, Field::Hidden),
        (|c| c.heads = 0, Field::Heads),
        (|c| c.kv_heads = 0, Field::KvHeads),
        (|c| c.kv_heads = 3, Field::KvHeads),
        (|c| c.head_dim = 33, Field::HeadDim),
        (|c| c.rms_eps = f32::NAN, Field::RmsEps),
        (|c| c.rms_eps = 0.0, Field::RmsEps),
        (|c| c.rope.theta = f64::NAN, Field::RopeTheta),
        (|c| c.rope.dims = 66, Field::RopeDims),
        (|c| c.rope.factors = Some(vec![f32::NAN; 16]), Field::RopeFactors),
        (|c| c.rope.factors = Some(vec![1.0; 15]), Field::RopeFactors),
        (|c| c.rope.scaling = RopeScaling::Linear { factor: f64::INFINITY }, Field::RopeFactor),
    ];
    let good = crate::weights::testing::tiny(Architecture::Llama);
    assert_eq!(good.validate(), Ok(()));
    for (change, field) in table {
        let mut config = good.clone();
        change(&mut config);
        assert_eq!(config.validate().map_err(|error| error.field), Err(field));
    }
}
