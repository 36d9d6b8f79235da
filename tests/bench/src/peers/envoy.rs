//! Envoy: as a TCP proxy with a limit of connections, and as a proxy of HTTP/2 requests.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use testkit::fixtures::Machine;

use super::{FRONT, command_in, wait_until_it_serves};
use crate::process::Process;
use crate::settings::{Settings, processors};

/// What it looks at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// Connections.
    L4,
    /// HTTP/2 requests.
    L7,
}

/// A running one.
pub struct Envoy {
    process: Process,
    endpoints: PathBuf,
}

impl Envoy {
    /// Starts it in front of these backends. `name` is that of its files.
    ///
    /// # Errors
    /// When it is not installed or ends.
    pub fn start(
        settings: &Settings,
        machine: &Machine,
        name: &str,
        layer: Layer,
        backends: &[SocketAddr],
    ) -> Result<Self> {
        let program = settings.envoy();
        ensure!(
            program.is_file(),
            "there is no {}: run `cargo xtask setup`",
            program.display()
        );
        let directory = settings.logs();
        let (file, endpoints) = (
            directory.join(format!("{name}.yaml")),
            directory.join(format!("{name}-endpoints.yaml")),
        );
        write(&file, &configuration(layer, &endpoints))?;
        write(&endpoints, &assignment(backends)?)?;
        let mut envoy = command_in(machine, &program);
        envoy.arg("--config-path").arg(&file);
        envoy.args(["--concurrency", &processors().to_string()]);
        envoy.args(["--disable-hot-restart", "--log-level", "warning"]);
        let process = Process::start(name, &directory, envoy)?;
        Ok(Self { process, endpoints })
    }

    /// Waits until a client that speaks TCP alone is served.
    ///
    /// # Errors
    /// When it ends or nobody is served.
    pub fn wait(&mut self, machine: &Machine) -> Result<()> {
        wait_until_it_serves(machine, &mut self.process)
    }

    /// Gives it other backends. Envoy looks at the file when another one is moved there.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn set_backends(&self, backends: &[SocketAddr]) -> Result<()> {
        let new = self.endpoints.with_extension("new");
        write(&new, &assignment(backends)?)?;
        fs::rename(&new, &self.endpoints).context("cannot move the list of endpoints")
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Fails if it has ended.
    ///
    /// # Errors
    /// Then, with the tail of its log.
    pub fn check(&mut self) -> Result<()> {
        self.process.check()
    }
}

fn write(path: &PathBuf, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

const TYPE: &str = "\"@type\": type.googleapis.com/envoy.extensions";

fn configuration(layer: Layer, endpoints: &std::path::Path) -> String {
    let (filters, protocol) = match layer {
        Layer::L4 => (tcp_filters(), String::new()),
        Layer::L7 => (http_filters(), http2()),
    };
    let (host, port) = (FRONT.ip(), FRONT.port());
    let endpoints = endpoints.display();
    format!(
        "node: {{ id: bench, cluster: bench }}
static_resources:
  listeners:
  - address: {{ socket_address: {{ address: {host}, port_value: {port} }} }}
    filter_chains:
    - filters:
{filters}
  clusters:
  - name: backends
    type: EDS
    eds_cluster_config:
      service_name: backends
      eds_config: {{ resource_api_version: V3, path_config_source: {{ path: \"{endpoints}\" }} }}
    connect_timeout: 1s
    lb_policy: LEAST_REQUEST
    circuit_breakers: {{ thresholds: [{{ max_connections: 1000000, max_pending_requests: 1000000, max_requests: 1000000 }}] }}
    health_checks:
    - {{ timeout: 1s, interval: 0.2s, no_traffic_interval: 0.2s, unhealthy_threshold: 1, healthy_threshold: 1, tcp_health_check: {{}} }}
{protocol}"
    )
}

fn tcp_filters() -> String {
    format!(
        "      - name: envoy.filters.network.connection_limit
        typed_config: {{ {TYPE}.filters.network.connection_limit.v3.ConnectionLimit, stat_prefix: limit, max_connections: 100000 }}
      - name: envoy.filters.network.tcp_proxy
        typed_config: {{ {TYPE}.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: proxy, cluster: backends, max_connect_attempts: 3 }}"
    )
}

fn http_filters() -> String {
    format!(
        "      - name: envoy.filters.network.http_connection_manager
        typed_config:
          {TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: proxy
          codec_type: HTTP2
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{ {TYPE}.filters.http.router.v3.Router }}
          route_config:
            virtual_hosts:
            - name: all
              domains: [\"*\"]
              routes:
              - match: {{ prefix: \"/\" }}
                route: {{ cluster: backends, timeout: 10s }}"
    )
}

fn http2() -> String {
    format!(
        "    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        {TYPE}.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{ http2_protocol_options: {{}} }}\n"
    )
}

fn assignment(backends: &[SocketAddr]) -> Result<String> {
    let mut text = String::from(
        "resources:\n- \"@type\": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment\n  cluster_name: backends\n  \
         endpoints:\n  - lb_endpoints:\n",
    );
    for backend in backends {
        writeln!(
            text,
            "    - endpoint: {{ address: {{ socket_address: {{ address: {}, port_value: {} }} }} }}",
            backend.ip(),
            backend.port()
        )?;
    }
    Ok(text)
}
