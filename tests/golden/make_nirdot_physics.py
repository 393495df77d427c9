#!/usr/bin/env python3
"""Makes nirdot_physics.safetensors, the golden numbers of tests/test_nirdot_physics.c, beside this script.

usage, from the repository root:  python tests/golden/make_nirdot_physics.py

    A.n, A.haskell              Haskell's A(n), from the integrals of Fresnel's reflection over the angle
    sphere.properties           [case][mu_a, mu_s', n, frequency, radius, radius of the source]
    sphere.cosine               [angle]
    sphere.fluence              [case][angle][re, im]: on the surface of a homogeneous sphere with the Robin condition, of a
                                point source of unit power: the expansion in spherical harmonics, with mpmath's Bessel
                                functions of half-integer order
    flat.properties             [case][mu_a, mu_s', n, frequency]; the source lies 1/mu_s' deep
    flat.distance               [distance]
    flat.fluence                [case][distance][re, im]: on the surface of a half-space with the Robin condition: the source,
                                its image, and an exponential line of images
All with 40 digits, rounded once; e^{+iwt}; mm. Made with mpmath 1.3.0, numpy 2.4.6.
"""
import pathlib

import mpmath as mp
import numpy as np
from safetensors.numpy import save_file

mp.mp.dps = 40
LIGHT = mp.mpf("2.99792458e11")


def fresnel(n, cosine):
    sine = n * mp.sqrt(1 - cosine ** 2)
    if sine >= 1:
        return mp.mpf(1)
    out = mp.sqrt(1 - sine ** 2)
    return (((n * cosine - out) / (n * cosine + out)) ** 2 + ((n * out - cosine) / (n * out + cosine)) ** 2) / 2


def haskell(n):
    n = mp.mpf(n)
    cuts = [0, mp.asin(1 / n), mp.pi / 2]
    flux = mp.quad(lambda t: 2 * mp.sin(t) * mp.cos(t) * fresnel(n, mp.cos(t)), cuts)
    current = mp.quad(lambda t: 3 * mp.sin(t) * mp.cos(t) ** 2 * fresnel(n, mp.cos(t)), cuts)
    reflection = (flux + current) / (2 - flux + current)
    return (1 + reflection) / (1 - reflection)


def medium(mu_a, mu_s, n, frequency):
    diffusion = 1 / (3 * (mp.mpf(mu_a) + mp.mpf(mu_s)))
    k = mp.sqrt((mp.mpf(mu_a) + 1j * 2 * mp.pi * frequency * mp.mpf(n) / LIGHT) / diffusion)
    return diffusion, k, 2 * haskell(n) * diffusion


def sphere(properties, cosines):
    mu_a, mu_s, n, frequency, radius, source = properties
    diffusion, k, zb = medium(mu_a, mu_s, n, frequency)
    x, x0 = k * radius, k * mp.mpf(source)
    i = lambda l, z: mp.sqrt(mp.pi / (2 * z)) * mp.besseli(l + mp.mpf(1) / 2, z)
    kk = lambda l, z: mp.sqrt(2 / (mp.pi * z)) * mp.besselk(l + mp.mpf(1) / 2, z)
    sums = [mp.mpc(0) for _ in cosines]
    l = 0
    while True:
        il, il1, kl, kl1 = i(l, x), i(l + 1, x), kk(l, x), kk(l + 1, x)
        di, dk = il1 + l / x * il, -kl1 + l / x * kl
        b = -(kl + zb * k * dk) / (il + zb * k * di)
        term = (2 * l + 1) * i(l, x0) * (kl + b * il)
        for a, c in enumerate(cosines):
            sums[a] += term * mp.legendre(l, mp.mpf(c))
        if abs(term) < mp.mpf("1e-18") * min(abs(s) for s in sums) and l > 10:
            break
        l += 1
    return [s * k / (4 * mp.pi * diffusion) for s in sums]


def flat(properties, distances):
    diffusion, k, zb = medium(*properties)
    z0 = 1 / mp.mpf(properties[1])
    answer = []
    for rho in distances:
        r = mp.hypot(rho, z0)
        line = mp.quad(lambda l: mp.exp(-l / zb - k * mp.hypot(rho, z0 + l)) / mp.hypot(rho, z0 + l),
                       [0, zb, 4 * zb, 16 * zb, 64 * zb, 120 * zb])
        answer.append((2 * mp.exp(-k * r) / r - 2 / zb * line) / (4 * mp.pi * diffusion))
    return answer


def pairs(rows):
    return np.array([[[float(v.real), float(v.imag)] for v in row] for row in rows])


indices = [1.1, 1.33, 1.37, 1.4, 1.5]
spheres = [[.005, 1.0, 1.4, 140e6, 27.0, 22.0], [.01, 1.5, 1.33, 140e6, 27.0, 20.0], [.004, .8, 1.4, 0.0, 25.0, 21.0]]
cosines = [0.9, 0.6, 0.2, -0.3, -0.8, -1.0]
flats = [[.005, 1.0, 1.4, 140e6], [.02, 1.0, 1.4, 140e6], [.02, .5, 1.33, 100e6]]
distances = [5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 40.0]
save_file({
    "A.n": np.array(indices), "A.haskell": np.array([float(haskell(n)) for n in indices]),
    "sphere.properties": np.array(spheres), "sphere.cosine": np.array(cosines),
    "sphere.fluence": pairs([sphere(s, cosines) for s in spheres]),
    "flat.properties": np.array(flats), "flat.distance": np.array(distances),
    "flat.fluence": pairs([flat(f, distances) for f in flats]),
}, str(pathlib.Path(__file__).with_name("nirdot_physics.safetensors")))
