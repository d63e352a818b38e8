//! A mixture of experts (Shazeer et al. 2017; Fedus et al. 2021, arXiv:2101.03961).
//!
//! Tokens are grouped by expert so that each expert's weights are read once. A token's sum runs over
//! its experts in ascending order, whoever else chose them: grouping never shows in the bits.

use super::forward::{FeedForwardScratch, forward_gated, lap};
use super::profile::{StepOp, StepProfile};
use crate::device::{Device, DeviceError, ExpertRun};
use crate::model::{DecoderConfig, Mixture};

/// Buffers of a mixture.
pub(super) struct MixtureScratch<D: Device> {
    /// Router's output, `[rows, experts]`.
    scores: D::Buffer,
    routes: D::Routes,
    runs: Vec<ExpertRun>,
    /// Inputs of one expert, `[its rows, hidden]`.
    input: D::Buffer,
    /// Output of one expert, `[its rows, hidden]`.
    output: D::Buffer,
    feed_forward: FeedForwardScratch<D>,
}

impl<D: Device> MixtureScratch<D> {
    /// Room for passes of `rows`; none where the model has no mixture.
    pub fn new(device: &D, config: &DecoderConfig, rows: usize) -> Result<Self, DeviceError> {
        let (rows, experts, used, inner) = match &config.moe {
            Some(moe) => (rows, moe.experts, moe.experts_per_token, moe.intermediate),
            None => (0, 0, 0, 0),
        };
        Ok(MixtureScratch {
            scores: device.buffer(rows, experts)?,
            routes: device.routes(rows, experts, used)?,
            runs: Vec::new(),
            input: device.buffer(rows, config.hidden)?,
            output: device.buffer(rows, config.hidden)?,
            feed_forward: FeedForwardScratch::new(device, rows, inner)?,
        })
    }
}

/// `out[t] = sum over the experts that t chose of weight * expert(x[t])`.
pub(super) fn forward_mixture<D: Device>(
    device: &mut D,
    mixture: &Mixture<D>,
    x: &mut D::Buffer,
    scratch: &mut MixtureScratch<D>,
    out: &mut D::Buffer,
    profile: &mut StepProfile,
) -> Result<(), DeviceError> {
    let MixtureScratch { scores, routes, runs, input, output, feed_forward } = scratch;
    device.project([&mixture.router], x, [scores]);
    device.route(scores, mixture.used, mixture.normalize, routes, runs)?;
    lap(device, profile, StepOp::Router);
    device.zeros_like(x, out);
    for &run in runs.iter() {
        device.gather(routes, run, x, input);
        let gated = &mixture.experts[run.expert];
        forward_gated(device, gated, input, feed_forward, output, profile);
        device.scatter_add(routes, run, output, out);
    }
    lap(device, profile, StepOp::Router);
    Ok(())
}
