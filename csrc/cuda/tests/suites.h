// suites.h: the parts of the kernels' test, run by main.cpp.
#pragma once

namespace test {

void run_simt();  // the host shim itself; not on a device
void run_moe_gemm();
void run_moe_align();
void run_moe_rows();
void run_fused();
void run_int8_rows();
void run_attention_rows();
void run_attention_decode();
void run_unpack();
void run_route();
void run_route_scores();
void run_activation();
void run_handover();
void run_gated_delta();
void run_mamba();
void run_short_conv();
void run_index();
void run_streams();
void run_latent_rows();
void run_latent_attention();

}  // namespace test
