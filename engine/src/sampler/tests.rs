use super::*;
use proptest::prelude::*;
use protocol::RequestId;

fn key() -> SamplerKey {
    SamplerKey::from_seed(7, 0)
}

fn params(change: impl FnOnce(&mut SamplingParams)) -> SamplingParams {
    let mut params = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
    change(&mut params);
    params
}

/// How often each token of a small vocabulary is drawn in `n` draws.
fn histogram(params: &SamplingParams, logits: &[f32], n: u64) -> Vec<u64> {
    let mut sampler = Sampler::new(params.clone(), key(), &[]);
    let mut counts = vec![0; logits.len()];
    for index in 0..n {
        let sampled = sampler.sample(&mut logits.to_vec(), index, None).expect("a token");
        counts[sampled.token as usize] += 1;
    }
    counts
}

#[test]
fn draws_follow_the_distribution() {
    let probabilities = [0.5f32, 0.3, 0.15, 0.05];
    let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
    let counts = histogram(&params(|_| {}), &logits, 20_000);
    for (count, p) in counts.iter().zip(probabilities) {
        let got = *count as f32 / 20_000.0;
        assert!((got - p).abs() < 0.015, "{got} is not near {p}");
    }
}

#[test]
fn truncations_leave_what_they_should() {
    let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
    type Change = fn(&mut SamplingParams);
    let table: [(&str, Change, [bool; 4]); 6] = [
        ("top_k 1", |p| p.top_k = 1, [true, false, false, false]),
        ("top_k 2", |p| p.top_k = 2, [true, true, false, false]),
        ("top_p 0.5", |p| p.top_p = 0.5, [true, false, false, false]),
        ("top_p 0.79", |p| p.top_p = 0.79, [true, true, false, false]),
        ("min_p 0.25", |p| p.min_p = 0.25, [true, true, true, false]),
        ("bias", |p| p.logit_bias = vec![(0, -100.0)], [false, true, true, true]),
    ];
    for (name, change, expected) in table {
        let counts = histogram(&params(change), &logits, 2_000);
        let seen: Vec<bool> = counts.iter().map(|&c| c > 0).collect();
        assert_eq!(seen, expected, "{name}: {counts:?}");
    }
}

#[test]
fn penalties() {
    let table = [
        (params(|p| p.presence_penalty = 1.0), [2.0, 1.0, -1.0]),
        (params(|p| p.frequency_penalty = 0.5), [2.0, 1.0, -1.0]),
        (params(|p| p.repetition_penalty = 2.0), [2.0, 1.0, -2.0]),
    ];
    for (params, expected) in table {
        // Token 1 was generated twice; token 2 stands in the prompt only.
        let mut counts = TokenCounts::new(true, &[2]);
        counts.push(1);
        counts.push(1);
        let mut logits = [2.0, 2.0, -1.0];
        counts.penalize(&params, &mut logits);
        assert_eq!(logits, expected, "{params:?}");
    }
}

#[test]
fn mask_and_nothing_left() {
    let mut sampler = Sampler::new(SamplingParams::default(), key(), &[]);
    let picked = sampler.sample(&mut [3.0, 2.0, 1.0], 0, Some(&[0b110]));
    assert_eq!(picked.map(|s| s.token), Some(1));
    assert_eq!(sampler.sample(&mut [3.0, 2.0], 1, Some(&[0])), None);
    assert_eq!(sampler.sample(&mut [f32::NAN, f32::NAN], 2, None), None);
    assert_eq!(
        sampler.sample(&mut [3.0; 40], 3, Some(&[0])),
        None,
        "a short mask forbids the rest"
    );
}

#[test]
fn logprobs_are_those_of_the_model() {
    let logits: Vec<f32> = [0.5f32, 0.3, 0.2].iter().map(|p| p.ln() + 4.0).collect();
    let asked = params(|p| {
        p.logprobs = Some(2);
        p.logit_bias = vec![(2, 100.0)];
    });
    let sampled = Sampler::new(asked, key(), &[]).sample(&mut logits.clone(), 0, None).unwrap();
    assert_eq!(sampled.token, 2);
    assert!((sampled.logprob - 0.2f32.ln()).abs() < 1e-5);
    let ids: Vec<_> = sampled.top.iter().map(|t| t.0).collect();
    assert_eq!(ids, [0, 1]);
}

#[test]
fn keys_separate_seeds_choices_and_requests() {
    let keys = [
        SamplerKey::from_seed(1, 0),
        SamplerKey::from_seed(1, 1),
        SamplerKey::from_seed(-1, 0),
        SamplerKey::from_request(RequestId(1), 0),
    ];
    for (i, a) in keys.iter().enumerate() {
        for b in &keys[i + 1..] {
            assert_ne!(a, b);
            assert_ne!(uniform(a, 0), uniform(b, 0));
        }
    }
    // Pinned: a change would make streams diverge between versions.
    assert_eq!(format!("{:.12}", uniform(&keys[0], 5)), PINNED_DRAW);
}

#[test]
fn ranges() {
    type Change = fn(&mut SamplingParams);
    let table: [(Change, Option<&str>); 9] = [
        (|_| {}, None),
        (|p| p.temperature = -0.1, Some("temperature")),
        (|p| p.temperature = f32::NAN, Some("temperature")),
        (|p| p.top_p = 0.0, Some("top_p")),
        (|p| p.min_p = 1.5, Some("min_p")),
        (|p| p.repetition_penalty = 0.0, Some("repetition_penalty")),
        (|p| p.presence_penalty = 2.5, Some("presence_penalty")),
        (|p| p.logprobs = Some(21), Some("top_logprobs")),
        (|p| p.logit_bias = vec![(100, 0.0)], Some("logit_bias")),
    ];
    for (change, expected) in table {
        let refused = params(change).validate(100).err().map(|e| e.field);
        assert_eq!(refused, expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// The draw with every truncation equals the plain definition on a sorted vocabulary.
    #[test]
    fn nucleus_is_the_smallest_set(
        logits in proptest::collection::vec(-8.0f32..8.0, 1..400),
        top_p in 0.05f32..1.0,
        index in 0u64..1000,
    ) {
        let asked = params(|p| p.top_p = top_p);
        let drawn = Sampler::new(asked, key(), &[]).sample(&mut logits.clone(), index, None);
        let token = drawn.expect("finite logits always give a token").token;
        let order = top_tokens(&logits, logits.len());
        let rank = order.iter().position(|&t| t == token).expect("of the vocabulary");
        let log_z = log_sum_exp(&logits);
        let before: f64 =
            order[..rank].iter().map(|&t| f64::from((logits[t as usize] - log_z).exp())).sum();
        prop_assert!(before < f64::from(top_p) + 1e-5, "rank {} of mass {}", rank, before);
    }
}

const PINNED_DRAW: &str = "0.857256770824";
