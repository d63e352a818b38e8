//! `vine doctor`: what this machine is, what it can do, and what stands in the way.

use super::args::DoctorArgs;
use super::{model, system};
use kernels::isa::Isa;
use kernels::measure::{Peaks, measure};
use kernels::pool::ThreadPool;
use nix::sys::resource::{Resource, getrlimit};
use serde::Serialize;
use std::net::TcpListener;
use std::time::Duration;

#[derive(Debug, Serialize)]
struct Diagnosis {
    version: &'static str,
    cpu: Option<String>,
    physical_cores: usize,
    logical_cores: usize,
    /// Kernels that would be used, and all that could be.
    isa: String,
    isas: Vec<String>,
    memory_total_bytes: Option<usize>,
    memory_available_bytes: Option<usize>,
    threads: usize,
    measured: Option<Measured>,
    open_files_max: Option<u64>,
    port_8420_free: bool,
    findings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Measured {
    memory_gb_per_second: f64,
    f32_gflops: f64,
    int8_gops: Option<f64>,
    bf16_gflops: Option<f64>,
    /// Tokens per second of one stream that memory allows for each GB of weights.
    decode_bound_tokens_per_second_per_gb: f64,
}

pub fn doctor(args: &DoctorArgs) -> anyhow::Result<()> {
    let diagnosis = Diagnosis::new(args);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&diagnosis)?);
    } else {
        diagnosis.print();
    }
    Ok(())
}

impl Diagnosis {
    fn new(args: &DoctorArgs) -> Self {
        let threads = args.threads.unwrap_or_else(model::default_threads).max(1);
        let isa = Isa::detect();
        let measured = (!args.quick).then(|| {
            let peaks = measure(&ThreadPool::new(threads), isa, MEASURE_TIME);
            Measured::from(peaks)
        });
        let mut diagnosis = Diagnosis {
            version: env!("CARGO_PKG_VERSION"),
            cpu: system::cpu_name(),
            physical_cores: system::physical_cores(),
            logical_cores: system::logical_cores(),
            isa: isa.to_string(),
            isas: Isa::available().map(|isa| isa.to_string()).collect(),
            memory_total_bytes: system::total_memory_bytes(),
            memory_available_bytes: system::available_memory_bytes(),
            threads,
            measured,
            open_files_max: getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(soft, _)| soft),
            port_8420_free: TcpListener::bind("127.0.0.1:8420").is_ok(),
            findings: Vec::new(),
        };
        diagnosis.findings = diagnosis.findings();
        diagnosis
    }

    fn findings(&self) -> Vec<String> {
        let mut findings = Vec::new();
        let mut say = |when: bool, text: String| {
            if when {
                findings.push(text);
            }
        };
        say(
            self.isa == Isa::Scalar.to_string(),
            "this CPU has none of the vector instructions that Grapevine has kernels for: models \
             run, but slowly"
                .to_owned(),
        );
        say(
            self.memory_available_bytes.is_some_and(|bytes| bytes < 1 << 30),
            "less than 1 GiB of memory is free: only the smallest models fit".to_owned(),
        );
        say(
            self.open_files_max.is_some_and(|max| max < 4096),
            format!(
                "at most {} files may be open: raise it (ulimit -n 65536) to serve many clients",
                self.open_files_max.unwrap_or(0)
            ),
        );
        say(
            !self.port_8420_free,
            "port 8420 is taken: a node is running, or `vine up --api 127.0.0.1:PORT` is needed"
                .to_owned(),
        );
        findings
    }

    fn print(&self) {
        let gib = |bytes: Option<usize>| {
            bytes.map_or("unknown".to_owned(), |b| {
                format!("{:.1} GiB", b as f64 / (1u64 << 30) as f64)
            })
        };
        println!("vine      {}", self.version);
        println!("cpu       {}", self.cpu.as_deref().unwrap_or("unknown"));
        println!(
            "cores     {} ({} with hardware threads)",
            self.physical_cores, self.logical_cores
        );
        println!("kernels   {} (of {})", self.isa, self.isas.join(", "));
        println!(
            "memory    {} free of {}",
            gib(self.memory_available_bytes),
            gib(self.memory_total_bytes)
        );
        if let Some(m) = &self.measured {
            println!("measured  with {} threads", self.threads);
            println!("          memory {:.1} GB/s", m.memory_gb_per_second);
            println!("          f32 {:.0} GFLOP/s", m.f32_gflops);
            if let Some(int8) = m.int8_gops {
                println!("          int8 {int8:.0} GOP/s");
            }
            if let Some(bf16) = m.bf16_gflops {
                println!("          bf16 {bf16:.0} GFLOP/s");
            }
            println!(
                "          at best {:.0} tokens/s for one stream of a model of 1 GB",
                m.decode_bound_tokens_per_second_per_gb
            );
        }
        let files = self.open_files_max.map_or("unknown".to_owned(), |n| n.to_string());
        println!("limits    {files} open files");
        let port = if self.port_8420_free { "free" } else { "taken" };
        println!("ports     8420 (API) {port}");
        match self.findings.as_slice() {
            [] => println!("\nNothing stands in the way."),
            findings => findings.iter().for_each(|f| println!("\n! {f}")),
        }
    }
}

impl From<Peaks> for Measured {
    fn from(peaks: Peaks) -> Self {
        let bytes = peaks.memory_bytes_per_second;
        Measured {
            memory_gb_per_second: bytes / 1e9,
            f32_gflops: peaks.f32_flops / 1e9,
            int8_gops: peaks.int8_ops.map(|ops| ops / 1e9),
            bf16_gflops: peaks.bf16_flops.map(|ops| ops / 1e9),
            decode_bound_tokens_per_second_per_gb: bytes / 1e9,
        }
    }
}

const MEASURE_TIME: Duration = Duration::from_secs(4);
