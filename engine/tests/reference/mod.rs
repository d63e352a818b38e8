//! A decoder written plainly in f64, to hold the executor against.
//!
//! One sequence, one token after another, every formula spelled out as the papers have it and as
//! `transformers` evaluates it. It shares no code with the engine: weights come as f32 vectors under
//! their Hugging Face names, rotary halves are not interleaved.

/// What the forward pass must know beyond the weights.
#[derive(Clone, Debug)]
pub struct Shape {
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    /// For each layer, the positions that a token sees, itself included.
    pub windows: Vec<Option<usize>>,
    pub moe: Option<Moe>,
}

#[derive(Clone, Copy, Debug)]
pub enum RopeScaling {
    None,
    Linear { factor: f64 },
    Llama3 { factor: f64, low: f64, high: f64, original: f64 },
    Yarn { factor: f64, beta_fast: f64, beta_slow: f64, original: f64 },
}

#[derive(Clone, Copy, Debug)]
pub struct Moe {
    pub experts: usize,
    pub used: usize,
    /// Whether the weights of the chosen experts are made to sum to one.
    pub normalize: bool,
    /// Mixtral's names for the experts, or Qwen3's.
    pub mixtral_names: bool,
}

pub struct Reference<'a> {
    pub shape: Shape,
    /// A tensor by its Hugging Face name, row-major `[out, in]`.
    pub weights: &'a dyn Fn(&str) -> Option<Vec<f32>>,
}

/// Results for each token of the input.
pub struct ReferenceOutput {
    pub logits: Vec<Vec<f64>>,
}

impl Reference<'_> {
    pub fn forward(&self, tokens: &[u32]) -> ReferenceOutput {
        let s = &self.shape;
        let table = self.need("model.embed_tokens.weight");
        let mut x: Vec<Vec<f64>> = tokens
            .iter()
            .map(|&t| widen(&table[t as usize * s.hidden..(t as usize + 1) * s.hidden]))
            .collect();
        for layer in 0..s.layers {
            self.attention(layer, &mut x);
            self.feed_forward(layer, &mut x);
        }
        let norm = self.need("model.norm.weight");
        let head = (self.weights)("lm_head.weight").unwrap_or(table);
        let hidden: Vec<Vec<f64>> = x.iter().map(|x| rms_norm(x, &norm, s.eps)).collect();
        let logits = hidden.iter().map(|h| product(&head, h)).collect();
        ReferenceOutput { logits }
    }

    fn need(&self, name: &str) -> Vec<f32> {
        (self.weights)(name).unwrap_or_else(|| panic!("the test model has no {name}"))
    }

    /// A matrix, and a bias if the model has one.
    fn project(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let mut out = product(&self.need(&format!("{name}.weight")), x);
        if let Some(bias) = (self.weights)(&format!("{name}.bias")) {
            add(&mut out, &widen(&bias));
        }
        out
    }

    fn attention(&self, layer: usize, x: &mut [Vec<f64>]) {
        let s = &self.shape;
        let at = |part: &str| format!("model.layers.{layer}.{part}");
        let norm = self.need(&at("input_layernorm.weight"));
        let normed: Vec<Vec<f64>> = x.iter().map(|x| rms_norm(x, &norm, s.eps)).collect();
        let project = |part: &str, norm: &str, rotate: bool| -> Vec<Vec<f64>> {
            let name = at(&format!("self_attn.{part}_proj"));
            let head_norm = (self.weights)(&at(&format!("self_attn.{norm}.weight")));
            let rows = normed.iter().enumerate().map(|(position, h)| {
                let mut row = self.project(&name, h);
                for head in row.chunks_mut(s.head_dim) {
                    if let (Some(weight), true) = (&head_norm, rotate) {
                        head.copy_from_slice(&rms_norm(head, weight, s.eps));
                    }
                    if rotate {
                        self.rotate(head, position);
                    }
                }
                row
            });
            rows.collect()
        };
        let q = project("q", "q_norm", true);
        let k = project("k", "k_norm", true);
        let v = project("v", "v_norm", false);
        let out = at("self_attn.o_proj");
        for position in 0..x.len() {
            let mixed = self.mix(&q[position], &k, &v, position, s.windows[layer]);
            add(&mut x[position], &self.project(&out, &mixed));
        }
    }

    /// Softmax attention of one token over those before it, for every head.
    fn mix(
        &self,
        q: &[f64],
        k: &[Vec<f64>],
        v: &[Vec<f64>],
        position: usize,
        window: Option<usize>,
    ) -> Vec<f64> {
        let s = &self.shape;
        let first = window.map_or(0, |w| (position + 1).saturating_sub(w));
        let scale = 1.0 / (s.head_dim as f64).sqrt();
        let mut mixed = Vec::with_capacity(s.heads * s.head_dim);
        for head in 0..s.heads {
            let of_head = head * s.head_dim..(head + 1) * s.head_dim;
            let kv = head / (s.heads / s.kv_heads) * s.head_dim;
            let scores: Vec<f64> = (first..=position)
                .map(|p| dot(&q[of_head.clone()], &k[p][kv..kv + s.head_dim]) * scale)
                .collect();
            let weights = softmax(&scores);
            let mut sum = vec![0.0; s.head_dim];
            for (p, w) in (first..=position).zip(weights) {
                for (o, v) in sum.iter_mut().zip(&v[p][kv..kv + s.head_dim]) {
                    *o += w * v;
                }
            }
            mixed.extend(sum);
        }
        mixed
    }

    fn feed_forward(&self, layer: usize, x: &mut [Vec<f64>]) {
        let s = &self.shape;
        let at = |part: &str| format!("model.layers.{layer}.{part}");
        let norm = self.need(&at("post_attention_layernorm.weight"));
        for x in x.iter_mut() {
            let h = rms_norm(x, &norm, s.eps);
            let out = match &s.moe {
                None => {
                    self.gated(&h, [at("mlp.gate_proj"), at("mlp.up_proj"), at("mlp.down_proj")])
                }
                Some(moe) => self.mixture(layer, moe, &h),
            };
            add(x, &out);
        }
    }

    fn gated(&self, h: &[f64], [gate, up, down]: [String; 3]) -> Vec<f64> {
        let (gate, up) = (self.project(&gate, h), self.project(&up, h));
        let silu = |g: f64| g / (1.0 + (-g).exp());
        let inner: Vec<f64> = gate.iter().zip(&up).map(|(&g, u)| silu(g) * u).collect();
        self.project(&down, &inner)
    }

    fn mixture(&self, layer: usize, moe: &Moe, h: &[f64]) -> Vec<f64> {
        let block = if moe.mixtral_names { "block_sparse_moe" } else { "mlp" };
        let at = |part: &str| format!("model.layers.{layer}.{block}.{part}");
        let weights = softmax(&self.project(&at("gate"), h));
        let mut order: Vec<usize> = (0..moe.experts).collect();
        order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
        order.truncate(moe.used);
        let sum: f64 = order.iter().map(|&e| weights[e]).sum();
        let names = if moe.mixtral_names {
            ["w1", "w3", "w2"]
        } else {
            ["gate_proj", "up_proj", "down_proj"]
        };
        let mut out = vec![0.0; h.len()];
        for e in order {
            let weight = if moe.normalize { weights[e] / sum } else { weights[e] };
            let one = self.gated(h, names.map(|n| at(&format!("experts.{e}.{n}"))));
            out.iter_mut().zip(one).for_each(|(o, v)| *o += weight * v);
        }
        out
    }

    /// RoPE (arXiv:2104.09864), first half of the head against the second.
    fn rotate(&self, head: &mut [f64], position: usize) {
        let half = head.len() / 2;
        let (frequencies, scale) = self.frequencies();
        for i in 0..half {
            let angle = position as f64 * frequencies[i];
            let (sin, cos) = (angle.sin() * scale, angle.cos() * scale);
            let (a, b) = (head[i], head[i + half]);
            head[i] = a * cos - b * sin;
            head[i + half] = b * cos + a * sin;
        }
    }

    fn frequencies(&self) -> (Vec<f64>, f64) {
        let (dim, theta) = (self.shape.head_dim as f64, self.shape.rope_theta);
        let plain: Vec<f64> =
            (0..self.shape.head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / dim)).collect();
        let tau = std::f64::consts::TAU;
        match self.shape.rope_scaling {
            RopeScaling::None => (plain, 1.0),
            RopeScaling::Linear { factor } => (plain.iter().map(|f| f / factor).collect(), 1.0),
            RopeScaling::Llama3 { factor, low, high, original } => {
                let scaled = plain.iter().map(|&f| {
                    let wavelength = tau / f;
                    if wavelength < original / high {
                        f
                    } else if wavelength > original / low {
                        f / factor
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                });
                (scaled.collect(), 1.0)
            }
            // arXiv:2309.00071, "NTK-by-parts" and the attention temperature.
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original } => {
                let dim_of =
                    |turns: f64| dim * (original / (turns * tau)).ln() / (2.0 * theta.ln());
                let low = dim_of(beta_fast).floor().max(0.0);
                let high = dim_of(beta_slow).ceil().min(dim - 1.0);
                let width = if high == low { 0.001 } else { high - low };
                let scaled = plain.iter().enumerate().map(|(i, &f)| {
                    let ramp = ((i as f64 - low) / width).clamp(0.0, 1.0);
                    f / factor * ramp + f * (1.0 - ramp)
                });
                (scaled.collect(), 0.1 * factor.ln() + 1.0)
            }
        }
    }
}

/// Natural logarithms of the softmax.
pub fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
    logits.iter().map(|l| l - max - sum.ln()).collect()
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    log_softmax(scores).into_iter().map(f64::exp).collect()
}

fn rms_norm(x: &[f64], weight: &[f32], eps: f64) -> Vec<f64> {
    let mean = dot(x, x) / x.len() as f64;
    let scale = 1.0 / (mean + eps).sqrt();
    x.iter().zip(weight).map(|(x, &w)| x * scale * f64::from(w)).collect()
}

fn product(matrix: &[f32], x: &[f64]) -> Vec<f64> {
    let rows = matrix.chunks_exact(x.len());
    rows.map(|row| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}
