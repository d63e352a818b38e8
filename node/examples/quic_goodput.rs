//! What one stream of quinn brings from one process to another over loopback: the measure for transfers of KV blocks.
//!
//! `cargo run --release -p grapevine-node --example quic_goodput [MIB [STREAMS [CONNECTIONS]]]`: sends so much in chunks of
//! a block, dealt out to so many streams on so many connections, discards it, and says MB/s of each of five runs. No
//! digests, no pages; the same windows as the data plane. The two ends on two hosts: `--send MIB STREAMS CONNECTIONS
//! ADDRESS` says its address and certificate, which `--receive` takes in its place.

use std::io::{BufRead, Write};
use std::net::{SocketAddr, UdpSocket};
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
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["--send", mib, streams, connections, address] => {
            send(Load::new(mib, streams, connections)?, address.parse()?).await
        }
        ["--receive", mib, streams, connections, address, certificate] => {
            receive(Load::new(mib, streams, connections)?, (address, certificate)).await
        }
        _ => {
            let arg = |n: usize, default| args.get(n).copied().unwrap_or(default);
            let (mib, streams, connections) = (arg(0, "256"), arg(1, "1"), arg(2, "1"));
            let mut child = Command::new(std::env::current_exe()?)
                .args(["--send", mib, streams, connections, "127.0.0.1:0"])
                .stdout(Stdio::piped())
                .spawn()?;
            let mut line = String::new();
            let out = child.stdout.take().context("no output")?;
            std::io::BufReader::new(out).read_line(&mut line)?;
            let sender = line.trim().split_once(' ').context("no address")?;
            receive(Load::new(mib, streams, connections)?, sender).await?;
            child.wait()?;
            Ok(())
        }
    }
}

#[derive(Clone, Copy)]
struct Load {
    blocks: usize,
    /// On each connection.
    streams: usize,
    connections: usize,
}

impl Load {
    fn new(mib: &str, streams: &str, connections: &str) -> anyhow::Result<Load> {
        let (streams, connections) = (streams.parse()?, connections.parse()?);
        anyhow::ensure!(streams > 0 && connections > 0, "at least one of each");
        Ok(Load { blocks: (mib.parse::<usize>()? << 20) / BLOCK_BYTES, streams, connections })
    }
}

/// Accepts the connections and fills streams for each run, a block on each in turn.
async fn send(load: Load, address: SocketAddr) -> anyhow::Result<()> {
    let made = rcgen::generate_simple_self_signed(vec!["quic".to_owned()])?;
    let key =
        PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.transport_config(transport());
    let endpoint = endpoint(Some(config), address)?;
    let certificate = data_encoding::HEXLOWER.encode(made.cert.der());
    println!("{} {certificate}", endpoint.local_addr()?);
    std::io::stdout().flush()?;
    let mut connections = Vec::new();
    for _ in 0..load.connections {
        connections.push(endpoint.accept().await.context("closed")?.await?);
    }
    let block = Bytes::from(vec![7u8; BLOCK_BYTES]);
    for _ in 0..RUNS {
        let mut streams = Vec::new();
        for _ in 0..load.streams {
            for connection in &connections {
                streams.push(connection.open_uni().await?);
            }
        }
        let count = streams.len();
        for n in 0..load.blocks {
            streams[n % count].write_chunk(block.clone()).await?;
        }
        for mut stream in streams {
            stream.finish()?;
            // Until it has all of it.
            let _ = stream.stopped().await;
        }
    }
    connections[0].closed().await;
    Ok(())
}

async fn receive(load: Load, (address, certificate): (&str, &str)) -> anyhow::Result<()> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(data_encoding::HEXLOWER.decode(certificate.as_bytes())?))?;
    let tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(transport());
    let endpoint = endpoint(None, "0.0.0.0:0".parse()?)?;
    let mut connections = Vec::new();
    for _ in 0..load.connections {
        connections.push(endpoint.connect_with(config.clone(), address.parse()?, "quic")?.await?);
    }
    for _ in 0..RUNS {
        let (mut begun, mut readers) = (None, Vec::new());
        for _ in 0..load.streams {
            for connection in &connections {
                let mut stream = connection.accept_uni().await?;
                begun.get_or_insert_with(Instant::now);
                readers.push(tokio::spawn(async move {
                    let mut bytes = 0;
                    while let Some(chunk) = stream.read_chunk(usize::MAX, true).await? {
                        bytes += chunk.bytes.len();
                    }
                    Ok::<_, anyhow::Error>(bytes)
                }));
            }
        }
        let mut bytes = 0;
        for reader in readers {
            bytes += reader.await??;
        }
        let took = begun.context("no stream")?.elapsed();
        println!("{:.1} MB/s", bytes as f64 / 1e6 / took.as_secs_f64());
    }
    connections.iter().for_each(|connection| connection.close(VarInt::from_u32(0), b"done"));
    endpoint.wait_idle().await;
    Ok(())
}

/// With socket buffers as large as the data plane's.
fn endpoint(
    server: Option<quinn::ServerConfig>,
    address: SocketAddr,
) -> anyhow::Result<quinn::Endpoint> {
    let socket = UdpSocket::bind(address)?;
    let state = quinn::udp::UdpSocketState::new((&socket).into())?;
    state.set_recv_buffer_size((&socket).into(), 4 << 20)?;
    state.set_send_buffer_size((&socket).into(), 4 << 20)?;
    let (config, runtime) = (quinn::EndpointConfig::default(), Arc::new(quinn::TokioRuntime));
    Ok(quinn::Endpoint::new(config, server, socket, runtime)?)
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
