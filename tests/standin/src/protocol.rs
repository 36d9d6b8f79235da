//! The messages and the paths of the two calls.

/// `skywalking.v3.ManagementService/keepAlive`: an [`InstancePing`] is answered with [`Commands`].
pub const KEEP_ALIVE: &str = "/skywalking.v3.ManagementService/keepAlive";
/// `skywalking.v3.TraceSegmentReportService/collect`: a stream of [`Segment`]s is answered with
/// [`Commands`].
pub const COLLECT: &str = "/skywalking.v3.TraceSegmentReportService/collect";

/// `InstancePingPkg`: who lives.
#[derive(Clone, PartialEq, prost::Message)]
pub struct InstancePing {
    /// The agent's service.
    #[prost(string, tag = "1")]
    pub service: String,
    /// The agent among those of its service.
    #[prost(string, tag = "2")]
    pub service_instance: String,
}

/// `SegmentObject`, without its spans.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Segment {
    /// The trace.
    #[prost(string, tag = "1")]
    pub trace_id: String,
    /// The segment of it.
    #[prost(string, tag = "2")]
    pub trace_segment_id: String,
    /// The agent's service.
    #[prost(string, tag = "4")]
    pub service: String,
    /// The agent among those of its service.
    #[prost(string, tag = "5")]
    pub service_instance: String,
}

/// `Commands`: what the OAP wants of the agent. Here always nothing.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Commands {}
