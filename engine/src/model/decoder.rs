//! A decoder's weights, packed for a device.

use super::identity::{NumericalIdentity, rope_digest};
use super::layer::{Attention, FeedForward, Gated, Layer, Mixture, Projection};
use super::{DecoderConfig, TensorSource};
use crate::device::{Device, DeviceError, Host};
use crate::weights::{Format, ModelError, Tensor, TensorRole};
use kernels::attention::KvLayout;
use kernels::format::dequantize;
use kernels::isa::Isa;
use kernels::pool::ThreadPool;
use kernels::quant::{quantize_q4_0, quantize_q8_0};
use std::sync::Arc;
use thiserror::Error;

/// A model made ready to compute: every tensor as the device wants it.
pub struct Decoder<D: Device = Host> {
    pub(crate) config: DecoderConfig,
    source: Arc<dyn TensorSource>,
    pub(crate) embedding: D::Table,
    pub(crate) layers: Vec<Layer<D>>,
    /// `[hidden]`
    pub(crate) final_norm: D::Vector,
    /// `[vocab, hidden]`
    pub(crate) head: D::Matrix,
    quant: Option<Quant>,
    packed_bytes: u64,
}

/// How a [`Decoder`] is loaded for the CPU.
pub struct LoadOptions<'a> {
    /// Kernels to pack for.
    pub isa: Isa,
    /// Threads that pack; 0 for one for each CPU.
    pub threads: usize,
    /// Quantizes matrices that the file has as floats. The output matrix, which is read from most
    /// directly, gets eight bits whatever is chosen; rows that do not fill whole blocks stay floats.
    pub quant: Option<Quant>,
    pub progress: &'a mut dyn FnMut(LoadProgress),
}

/// Formats that float weights can be quantized to while loading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quant {
    Q8_0,
    Q4_0,
}

/// How far loading has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    pub bytes_done: u64,
    pub bytes_total: u64,
}

/// Why a model could not be loaded. Nothing was kept.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LoadError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("tensor `{tensor}`: {reason}")]
    Tensor { tensor: String, reason: String },
    #[error("this CPU does not have {isa}")]
    Isa { isa: Isa },
}

impl Decoder {
    /// Reads every tensor of `source` once. `progress` is called after each.
    pub fn load(
        source: Arc<dyn TensorSource>,
        options: LoadOptions<'_>,
    ) -> Result<Decoder, LoadError> {
        let LoadOptions { isa, threads, quant, progress } = options;
        if !isa.is_available() {
            return Err(LoadError::Isa { isa });
        }
        let host = Host::new(isa, threads);
        Decoder::load_on(&host, host.pool(), source, quant, progress)
    }
}

impl<D: Device> Decoder<D> {
    /// [`load`](Decoder::load) for any device: `quant` as there; the threads of `pool` quantize.
    pub fn load_on(
        device: &D,
        pool: &ThreadPool,
        source: Arc<dyn TensorSource>,
        quant: Option<Quant>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Decoder<D>, LoadError> {
        let config = source.config().clone();
        let mut loader = Loader {
            source: &*source,
            config: &config,
            device,
            pool,
            quant,
            progress,
            bytes_done: 0,
            bytes_total: bytes_total(&*source)?,
            packed_bytes: 0,
        };
        let mut layers = Vec::new();
        for layer in 0..config.layers {
            layers.push(loader.layer(layer)?);
        }
        let final_norm = loader.vector(TensorRole::OutputNorm)?;
        let head = loader.head()?;
        let packed_bytes = loader.packed_bytes;
        let embedding = device.table(&source)?;
        Ok(Decoder { config, source, embedding, layers, final_norm, head, quant, packed_bytes })
    }

    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Bytes of memory that the packed weights take.
    pub fn packed_bytes(&self) -> u64 {
        self.packed_bytes
    }

    /// What the bits of keys and values in blocks of `layout` depend on. The first call may read
    /// all weights.
    pub fn identity(&self, layout: &KvLayout) -> NumericalIdentity {
        NumericalIdentity {
            weights_digest: self.source.digest(),
            quant: self.quant,
            architecture: self.config.architecture,
            kv_dtype: layout.dtype,
            rope_digest: rope_digest(&self.config.rope),
            numerics_version: D::NUMERICS,
        }
    }
}

/// Bytes of the tensors that will be packed.
fn bytes_total(source: &dyn TensorSource) -> Result<u64, LoadError> {
    let config = source.config();
    let is_read = |role: &TensorRole| config.tied_embeddings || *role != TensorRole::TokenEmbedding;
    let mut total = 0;
    for role in TensorRole::all(config).filter(is_read) {
        total += source.tensor(role)?.bytes.len() as u64;
    }
    Ok(total)
}

/// Loading in progress.
struct Loader<'a, D> {
    source: &'a dyn TensorSource,
    config: &'a DecoderConfig,
    device: &'a D,
    pool: &'a ThreadPool,
    quant: Option<Quant>,
    progress: &'a mut dyn FnMut(LoadProgress),
    bytes_done: u64,
    bytes_total: u64,
    packed_bytes: u64,
}

impl<'a, D: Device> Loader<'a, D> {
    fn layer(&mut self, l: usize) -> Result<Layer<D>, LoadError> {
        use TensorRole::*;
        let config = self.config;
        let (qkv_bias, qk_norm) = (config.qkv_bias, config.qk_norm);
        let attention_norm = self.vector(AttnNorm(l))?;
        let attention = Attention {
            q: self.projection(Q(l), qkv_bias.then_some(QBias(l)))?,
            k: self.projection(K(l), qkv_bias.then_some(KBias(l)))?,
            v: self.projection(V(l), qkv_bias.then_some(VBias(l)))?,
            q_norm: self.optional(qk_norm.then_some(QNorm(l)))?,
            k_norm: self.optional(qk_norm.then_some(KNorm(l)))?,
            output: self.projection(AttnOut(l), config.o_bias.then_some(AttnOutBias(l)))?,
            window: config.window(l),
        };
        let feed_forward_norm = self.vector(FfnNorm(l))?;
        let feed_forward = match &config.moe {
            None => FeedForward::Dense(Gated {
                gate: self.projection(Gate(l), config.mlp_bias.then_some(GateBias(l)))?,
                up: self.projection(Up(l), config.mlp_bias.then_some(UpBias(l)))?,
                down: self.projection(Down(l), config.mlp_bias.then_some(DownBias(l)))?,
            }),
            Some(moe) => {
                let router = Projection { weight: self.matrix(Router(l), None)?, bias: None };
                let mut experts = Vec::new();
                for e in 0..moe.experts {
                    experts.push(Gated {
                        gate: self.projection(ExpertGate(l, e), None)?,
                        up: self.projection(ExpertUp(l, e), None)?,
                        down: self.projection(ExpertDown(l, e), None)?,
                    });
                }
                let (used, normalize) = (moe.experts_per_token, moe.norm_topk_prob);
                FeedForward::Mixture(Mixture { router, experts, used, normalize })
            }
        };
        Ok(Layer { attention_norm, attention, feed_forward_norm, feed_forward })
    }

    fn head(&mut self) -> Result<D::Matrix, LoadError> {
        let quant = self.quant.map(|_| Quant::Q8_0);
        let role = match self.config.tied_embeddings {
            true => TensorRole::TokenEmbedding,
            false => TensorRole::Output,
        };
        self.matrix(role, quant)
    }

    fn projection(
        &mut self,
        weight: TensorRole,
        bias: Option<TensorRole>,
    ) -> Result<Projection<D>, LoadError> {
        let quant = self.quant;
        Ok(Projection { weight: self.matrix(weight, quant)?, bias: self.optional(bias)? })
    }

    fn optional(&mut self, role: Option<TensorRole>) -> Result<Option<D::Vector>, LoadError> {
        role.map(|role| self.vector(role)).transpose()
    }

    fn vector(&mut self, role: TensorRole) -> Result<D::Vector, LoadError> {
        let tensor = self.tensor(role)?;
        let mut values = vec![0.0; tensor.rows * tensor.cols];
        dequantize(tensor.format, &tensor.bytes, &mut values).map_err(|e| LoadError::Tensor {
            tensor: tensor.name.clone(),
            reason: e.to_string(),
        })?;
        let vector = self.device.vector(&values).map_err(|e| Self::refuse(&tensor, e))?;
        self.note(&tensor);
        Ok(vector)
    }

    fn matrix(&mut self, role: TensorRole, quant: Option<Quant>) -> Result<D::Matrix, LoadError> {
        let tensor = self.tensor(role)?;
        let Tensor { rows, cols, .. } = tensor;
        let fits = !tensor.format.is_quantized() && cols.is_multiple_of(QUANT_BLOCK);
        let packed = match quant.filter(|_| fits) {
            Some(quant) => {
                let bytes = self.quantize(&tensor, quant)?;
                self.device.matrix(quant.format(), rows, cols, &bytes)
            }
            None => self.device.matrix(tensor.format, rows, cols, &tensor.bytes),
        };
        let matrix = packed.map_err(|e| Self::refuse(&tensor, e))?;
        self.packed_bytes += D::matrix_bytes(&matrix) as u64;
        self.note(&tensor);
        self.source.release(role);
        Ok(matrix)
    }

    /// The tensor of a role, in the shape that the description asks for.
    fn tensor(&self, role: TensorRole) -> Result<Tensor<'a>, LoadError> {
        let tensor = self.source.tensor(role)?;
        let (rows, cols) = role.shape(self.config);
        if (tensor.rows, tensor.cols) != (rows, cols) {
            let reason = format!("has {} x {}; expected {rows} x {cols}", tensor.rows, tensor.cols);
            return Err(LoadError::Tensor { tensor: tensor.name, reason });
        }
        Ok(tensor)
    }

    fn refuse(tensor: &Tensor<'_>, error: DeviceError) -> LoadError {
        LoadError::Tensor { tensor: tensor.name.clone(), reason: error.to_string() }
    }

    /// A float matrix in blocks of `quant`.
    fn quantize(&self, tensor: &Tensor<'_>, quant: Quant) -> Result<Vec<u8>, LoadError> {
        let (from, to, cols) = (tensor.format, quant.format(), tensor.cols);
        let refuse = |reason: String| LoadError::Tensor { tensor: tensor.name.clone(), reason };
        let (Some(from_row), Some(to_row)) = (from.bytes_for(cols), to.bytes_for(cols)) else {
            return Err(refuse(format!("rows of {cols} values cannot become {to}")));
        };
        if tensor.bytes.len() != from_row * tensor.rows {
            return Err(refuse(format!("has {} bytes", tensor.bytes.len())));
        }
        let mut out = vec![0u8; to_row * tensor.rows];
        self.pool.run_chunks(&mut out, to_row * ROWS_PER_TASK, |task, out| {
            let mut values = vec![0.0f32; cols];
            let rows = tensor.bytes[task * ROWS_PER_TASK * from_row..].chunks_exact(from_row);
            for (row, out) in rows.zip(out.chunks_exact_mut(to_row)) {
                dequantize(from, row, &mut values).expect("a row has the bytes of its values");
                let done = match quant {
                    Quant::Q8_0 => quantize_q8_0(&values, out),
                    Quant::Q4_0 => quantize_q4_0(&values, out),
                };
                done.expect("a row fills whole blocks");
            }
        });
        Ok(out)
    }

    fn note(&mut self, tensor: &Tensor<'_>) {
        self.bytes_done += tensor.bytes.len() as u64;
        let (bytes_done, bytes_total) = (self.bytes_done, self.bytes_total);
        (self.progress)(LoadProgress { bytes_done, bytes_total });
    }
}

impl Quant {
    pub fn format(self) -> Format {
        match self {
            Quant::Q8_0 => Format::Q8_0,
            Quant::Q4_0 => Format::Q4_0,
        }
    }
}

/// Values in a block of either quantization.
const QUANT_BLOCK: usize = 32;
/// Rows that a thread quantizes at once.
const ROWS_PER_TASK: usize = 16;
