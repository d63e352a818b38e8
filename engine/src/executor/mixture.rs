//! A mixture of experts (Shazeer et al. 2017; Fedus et al. 2021, arXiv:2101.03961).
//!
//! Tokens are grouped by expert so that each expert's weights are read once. A token's sum runs over
//! its experts in ascending order, whoever else chose them: grouping never shows in the bits.

use super::forward::{FeedForwardScratch, forward_gated, sized};
use super::profile::{StepOp, StepProfile};
use crate::model::Mixture;
use kernels::isa::Isa;
use kernels::linear::{Activations, matmul};
use kernels::ops;
use kernels::pool::ThreadPool;

/// Buffers of a mixture; they grow to the largest pass and stay.
#[derive(Debug, Default)]
pub(super) struct MixtureScratch {
    /// Router's output, `[rows, experts]`.
    scores: Vec<f32>,
    /// What each row sends where, ordered by expert, then by row.
    routes: Vec<Route>,
    /// Experts of one row, best first.
    order: Vec<u32>,
    /// Inputs of one expert, `[its rows, hidden]`.
    input: Activations,
    /// Output of one expert, `[its rows, hidden]`.
    output: Vec<f32>,
    feed_forward: FeedForwardScratch,
}

#[derive(Clone, Copy, Debug)]
struct Route {
    expert: u32,
    row: u32,
    weight: f32,
}

/// `out[t] = sum over the experts that t chose of weight * expert(x[t])`.
pub(super) fn forward_mixture(
    pool: &ThreadPool,
    mixture: &Mixture,
    x: &mut Activations,
    scratch: &mut MixtureScratch,
    out: &mut [f32],
    profile: &mut StepProfile,
) {
    let (rows, hidden) = (x.tokens(), x.cols());
    let experts = mixture.experts.len();
    scratch.scores.resize(rows * experts, 0.0);
    matmul(pool, &mixture.router, x, &mut scratch.scores);
    scratch.route(mixture, mixture.router.isa());
    profile.lap(StepOp::Router);
    out.fill(0.0);
    let mut from = 0;
    while from < scratch.routes.len() {
        let expert = scratch.routes[from].expert;
        let count = scratch.routes[from..].iter().take_while(|r| r.expert == expert).count();
        let routes = &scratch.routes[from..from + count];
        let input = scratch.input.resize(count, hidden);
        for (route, input) in routes.iter().zip(input.chunks_exact_mut(hidden)) {
            input.copy_from_slice(&x.values()[route.row as usize * hidden..][..hidden]);
        }
        let output = sized(&mut scratch.output, count * hidden);
        let gated = &mixture.experts[expert as usize];
        let ff = &mut scratch.feed_forward;
        forward_gated(pool, gated, &mut scratch.input, ff, output, profile);
        for (route, output) in routes.iter().zip(output.chunks_exact(hidden)) {
            let out = &mut out[route.row as usize * hidden..][..hidden];
            for (out, value) in out.iter_mut().zip(output) {
                *out += route.weight * value;
            }
        }
        from += count;
    }
    profile.lap(StepOp::Router);
}

impl MixtureScratch {
    /// Chooses experts for each row of `scores`; of equal scores the lower expert wins.
    fn route(&mut self, mixture: &Mixture, isa: Isa) {
        let experts = mixture.experts.len();
        self.routes.clear();
        for (row, scores) in self.scores.chunks_exact_mut(experts).enumerate() {
            ops::softmax(isa, scores);
            let score = |&e: &u32| scores[e as usize];
            self.order.clear();
            self.order.extend(0..experts as u32);
            self.order.sort_unstable_by(|a, b| score(b).total_cmp(&score(a)).then(a.cmp(b)));
            let chosen = &self.order[..mixture.used];
            let sum = if mixture.normalize { chosen.iter().map(score).sum() } else { 1.0 };
            self.routes.extend(chosen.iter().map(|expert| Route {
                expert: *expert,
                row: row as u32,
                weight: score(expert) / sum,
            }));
        }
        self.routes.sort_unstable_by_key(|r| (r.expert, r.row));
    }
}
