//! What one stream of quinn brings from one process to another over loopback: the measure for transfers of KV blocks.
//!
//! `cargo run --release -p grapevine-node --example quic_goodput [MIB]`: sends so much in chunks of a block, discards it, and
//! says MB/s of each of five runs. No digests, no pages; the same windows as the data plane.

use std::io::{BufRead, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{TransportConfig, VarInt};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

const BLOCK_BYTES: usize = 196_608;
const RUNS: usize = 5;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    match args.next() {
        Some(arg) if arg == "--send" => send(args.next().context("MIB")?.parse()?).await,
        mib => receive(mib.map_or(Ok(256), |mib| mib.parse())?).await,
    }
}

/// Accepts a connection and fills a stream for each run.
async fn send(mib: usize) -> anyhow::Result<()> {
    let made = rcgen::generate_simple_self_signed(vec!["quic".to_owned()])?;
    let key =
        PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.transport_config(transport());
    let endpoint = quinn::Endpoint::server(config, "127.0.0.1:0".parse()?)?;
    let certificate = data_encoding::HEXLOWER.encode(made.cert.der());
    println!("{} {certificate}", endpoint.local_addr()?);
    std::io::stdout().flush()?;
    let connection = endpoint.accept().await.context("closed")?.await?;
    let block = Bytes::from(vec![7u8; BLOCK_BYTES]);
    for _ in 0..RUNS {
        let mut stream = connection.open_uni().await?;
        for _ in 0..(mib << 20) / BLOCK_BYTES {
            stream.write_chunk(block.clone()).await?;
        }
        stream.finish()?;
        // Until it has all of it.
        let _ = stream.stopped().await;
    }
    connection.closed().await;
    Ok(())
}

async fn receive(mib: usize) -> anyhow::Result<()> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--send", &mib.to_string()])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    let out = child.stdout.take().context("no output")?;
    std::io::BufReader::new(out).read_line(&mut line)?;
    let (address, certificate) = line.trim().split_once(' ').context("no address")?;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(data_encoding::HEXLOWER.decode(certificate.as_bytes())?))?;
    let tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(transport());
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse()?)?;
    let connection = endpoint.connect_with(config, address.parse()?, "quic")?.await?;
    for _ in 0..RUNS {
        let mut stream = connection.accept_uni().await?;
        let (begun, mut bytes) = (Instant::now(), 0);
        while let Some(chunk) = stream.read_chunk(usize::MAX, true).await? {
            bytes += chunk.bytes.len();
        }
        println!("{:.0} MB/s", bytes as f64 / 1e6 / begun.elapsed().as_secs_f64());
    }
    connection.close(VarInt::from_u32(0), b"done");
    endpoint.wait_idle().await;
    child.wait()?;
    Ok(())
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn transport() -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    transport
        .stream_receive_window(VarInt::from_u32(2 << 20))
        .receive_window(VarInt::from_u32(20 << 20))
        .send_window(20 << 20)
        .max_idle_timeout(Some(Duration::from_secs(30).try_into().expect("short")));
    Arc::new(transport)
}
